"""int8 models whose states stay float32: calibration on real clips, a search by multi-step error, the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import onnx
from numpy.typing import NDArray

from stepcell import __version__
from stepcell.contract import CellSpec, StepContract
from stepcell.errors import ExportError, UsageError
from stepcell.exporter.quantize.calibrate import SETTLED, calibrate
from stepcell.exporter.quantize.flat_graph import FlatGraph, flat_graph
from stepcell.exporter.quantize.search import QUANTILES, Candidate, Losses, find_layers
from stepcell.exporter.step_onnx.graph import embed_contract
from stepcell.files import atomic_path, sha256_file
from stepcell.onnx_model import contract_text, read_onnx
from stepcell.overwrite import check_output, is_exported_model
from stepcell.quantization import CalibrationClip, Quantization
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32
from stepcell.runtime.verify.clips import Clip, source_clip

__all__ = ["FRAMES", "MAX_LOSS", "quantize"]

FRAMES = 64  # of each clip
MAX_LOSS = 0.019
_FEWEST = 8  # frames of a clip: its last quarter is measured on
Frames: TypeAlias = Sequence[Mapping[str, NDArray[Any]]]
_INLINED = "inlined, so that its convolutions can be int8"


def quantize(
    source: str | Path,
    target: str | Path,
    clips: Sequence[str | Path | Frames],
    *,
    keep: Sequence[str] = (),
    max_loss: float = MAX_LOSS,
    frames: int = FRAMES,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> StepContract:
    """Write an int8 form of an exported model: convolutions in int8, all else, and every state, in float32.

    Weights are symmetric with a scale for each output channel, activations symmetric with one for the tensor, as
    QuantizeLinear and DequantizeLinear that ONNX Runtime and TensorRT turn into int8 convolutions (Jacob et al. 2018,
    arXiv 1712.05877). The ranges come from running the model over real clips with its states fed back, which are
    initial at the first frame of each.

    Args:
        source: an exported ONNX file; one in float16 is brought to float32 first.
        target: the file to write.
        clips: videos, folders of pictures or .npy files, as `run_streams` takes them; or, for a model of something else
            than pictures, the inputs of each step as arrays by name. Each clip has one frame size.
        keep: convolutions to keep in float32, by name.
        max_loss: largest rms difference of an output to the float32 model, relative to the standard deviation of that
            output, over the last quarter of every clip; layers stay in float32 until it holds.
        frames: of each clip, from the first one on.
        overwrite: replace an existing file that is no exported model.
        progress: called with a line for every stage.

    Returns:
        The contract as written; `quantization` has recipe, layers, clips and loss.

    Raises:
        UsageError: no clip, an unknown layer, or `target` is an input or a foreign file.
        InputError: a file cannot be read, holds NaN, has too few frames, or does not fit the model.
        ContractError: the file has no contract, or has changed since its export.
        ExportError: nothing can be quantised, or it is quantised already.
        ParityError: `max_loss` cannot be held.
        OutputError: `target` cannot be written.
    """
    source, target = Path(source), Path(target)
    reads: dict[str | Path, str] = {source: "the model"}
    reads |= {clip: "--calibrate" for clip in clips if isinstance(clip, (str, Path))}
    check_output(target, is_exported_model, reads=reads, overwrite=overwrite)
    if not clips:
        raise UsageError(
            "--calibrate: no clip given; ranges are measured on real frames, random ones cost far more",
            hint=f"stepcell quantize {source} -o {target} --calibrate clip.mp4",
        )
    file = read_onnx(source)
    if isinstance(file.contract.quantization, Quantization):
        raise ExportError(f"{source}: is quantised already", hint="quantise the file that it was made from")
    wide = StepContract.from_json(contract_text(to_float32(file.model)) or "", subject=str(source), check=False)
    graph = flat_graph(file)
    _check_layers(graph, source, keep)
    read = [_read(wide, clip, frames) for clip in clips]
    with atomic_path(target) as temporary:
        losses = Losses(graph, wide, read)
        calibration = calibrate(graph, wide, read, QUANTILES)
        played = f", played to and fro for {SETTLED} steps each" if wide.states else ""
        progress(f"calibrated on {sum(map(len, read))} frames of {len(read)} clip{'s' * (len(read) > 1)}{played}")
        found = find_layers(graph, calibration, losses, keep=keep, max_loss=max_loss, progress=progress)
        model = onnx.load_from_string(found.data)
        contract = _contract(wide, graph, found, losses.psnr(found.loss), list(zip(clips, read, strict=True)))
        contract = embed_contract(model, contract)
        temporary.write_bytes(model.SerializeToString())
    return contract


def _check_layers(graph: FlatGraph, source: Path, keep: Sequence[str]) -> None:
    if not graph.convolutions:
        raise ExportError(f"{source}: has no convolution with constant weights, and only these become int8")
    if unknown := [name for name in keep if name not in graph.convolutions]:
        raise UsageError(
            f"--keep {unknown[0]}: the model has no such convolution", hint=f"it has {', '.join(graph.convolutions)}"
        )
    if len(set(keep)) == len(graph.convolutions):
        raise UsageError("--keep: names every convolution, so none is left for int8")


def _read(contract: StepContract, given: str | Path | Frames, frames: int) -> Clip:
    if isinstance(given, (str, Path)):
        clip = source_clip(contract, str(given), limit=frames)
    else:
        clip = Clip(given[:frames], "frames")
    if len(clip) < _FEWEST:
        raise UsageError(
            f"{clip.name}: {len(clip)} frames; expected at least {_FEWEST}: the last quarter is measured on"
        )
    return clip


def _contract(
    wide: StepContract,
    graph: FlatGraph,
    found: Candidate,
    psnr: dict[str, float],
    clips: Sequence[tuple[str | Path | Frames, Clip]],
) -> StepContract:
    def inlined(cell: CellSpec) -> CellSpec:
        return msgspec.structs.replace(cell, op=None, reason=_INLINED) if cell.op else cell

    record = Quantization(
        layers=found.layers,
        kept=tuple(name for name in graph.convolutions if name not in found.layers),
        quantile=found.quantile,
        equalization=found.equalization,
        clips=tuple(_clip_record(text, clip) for text, clip in clips),
        loss=found.loss,
        psnr=psnr,
    )
    return msgspec.structs.replace(
        wide,
        cells=tuple(inlined(cell) for cell in wide.cells),
        source={**wide.source, "stepcell": __version__, "onnx": onnx.__version__},
        parity=None,
        quantization=record,
    )


def _clip_record(given: str | Path | Frames, clip: Clip) -> CalibrationClip:
    if not isinstance(given, (str, Path)):
        return CalibrationClip(name=clip.name, sha256=None, frames=len(clip))
    path = Path(given)
    return CalibrationClip(name=path.name, sha256=sha256_file(path) if path.is_file() else None, frames=len(clip))
