"""Refusal of pixels whose values are undefined, with the two commands that declare them, for the files of this run."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import OutputError, StepcellError
from stepcell.pixels import value_range
from stepcell.runtime.engine.sidecar import read_sidecar
from stepcell.runtime.media.postprocess import choose_output, is_label_map
from stepcell.runtime.media.preprocess import require_declared
from stepcell.runtime.media.sink import Sink
from stepcell.runtime.media.source import Source, display_name

__all__ = ["Input", "Output", "Undeclared"]

logger = logging.getLogger(__name__)

Input = str | Path | Source
Output = str | Path | Sink | None


class Undeclared:
    """Checks that the values of pictures are declared.

    Args:
        model: its path.
        inputs, outputs: of the run.
    """

    def __init__(self, model: str, inputs: Sequence[Input], outputs: Sequence[Output]) -> None:
        self._model, self._inputs, self._outputs = model, inputs, outputs

    def refuse_input(self, contract: StepContract) -> None:
        """Raise UsageError if the range of the model's input is undefined."""
        spec = contract.inputs[0]
        require_declared(spec, self._hint("0,1"))

    def refuse_output(self, contract: StepContract, sink: Sink) -> None:
        """Raise UsageError if the sink takes pixels and the output has no range; log a note about labels."""
        try:
            output = choose_output(contract, sink)
        except OutputError:  # the stream reports it
            return
        if not sink.takes_pixels:
            return
        if is_label_map(output):
            logger.info(
                f"{sink.name}: the labels of {output.name} are grey levels; --range {output.name}:0,HIGH spreads them, "
                "a .npy or a folder of pictures keeps them exactly"
            )
            return
        require_declared(output, self._hint(f"{output.name}:{_limits(contract.inputs[0])}"))

    def _hint(self, declared: str) -> str:
        onnx = Path(self._model)
        if onnx.suffix.lower() != ".onnx":
            with contextlib.suppress(StepcellError):
                onnx = onnx.with_name(read_sidecar(onnx).onnx)
        target = onnx.with_name(f"{onnx.stem}-declared.onnx")
        run = ["stepcell", "run", self._model]
        for option, names in (("--input", self._inputs), ("--output", self._outputs)):
            for name in names:
                run += [] if name is None else [option, str(name) if isinstance(name, (str, Path)) else name.name]
        fuse = ["stepcell", "fuse", str(onnx), "--range", declared, "-o", str(target)]
        rebuild = "" if onnx == Path(self._model) else ", and build the engine of that file"
        return (
            f"if it was trained on {declared.rpartition(':')[2].replace(',', ' to ')}, declare it in the file: "
            f"{shlex.join(fuse)}{rebuild}; or for this run: {display_name(shlex.join([*run, '--range', declared]))}; "
            "--mean, --std and --channels BGR declare more (docs/contract.md, Pixels)"
        )


def _limits(spec: TensorSpec) -> str:
    """Range of the input, which is the likeliest one of the output too, unless the input takes bytes."""
    limits = value_range(spec) if spec.dtype.startswith("float") else None
    low, high = limits or (0.0, 1.0)
    return f"{low:g},{high:g}"
