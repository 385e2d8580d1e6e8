"""`stepcell export`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stepcell.cli.common import joined, json_option, overwrite_option, parse_settings
from stepcell.cli.console import log, print_json, stage, table, working
from stepcell.cli.parity import bound, error_of
from stepcell.cli.pixel_options import pixel_dtype_option, pixel_options, pop_pixel_dtype, pop_pixels
from stepcell.errors import UsageError
from stepcell.optional_imports import require
from stepcell.overwrite import check_output, is_exported_model
from stepcell.shapes import parse_shapes

if TYPE_CHECKING:
    from torch import nn

    from stepcell.exporter import Checkpoint
    from stepcell.exporter.from_module.model import LiftedModel


def _list_families(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    _require_torch()
    from stepcell.exporter import FAMILIES
    from stepcell.renamed_families import first_name

    rows = []
    for family in FAMILIES.values():
        alias = "" if first_name(family.name) == family.name else f" (alias {first_name(family.name)})"
        rows.append([family.name + alias, family.summary, ", ".join(family.settings)])
    table("", ["family", "what it is", "--set keys"], rows, to_stdout=True)
    ctx.exit()


@click.command(
    epilog="""\b
Examples:
  stepcell export denoiser.safetensors -o denoiser.onnx
  stepcell export net.pth -o net.onnx --module my_package.net:make --set channels=32 --shape x:1x3x256x256 --range 0,1
  stepcell export denoiser.safetensors -o plain.onnx --plain --precision float32 --shape x:1x3x256x256
  stepcell export denoiser.safetensors -o bytes.onnx --pixels uint8
  stepcell export gru.pth --family gru --shape x:1x64 --precision float32
  stepcell export rvm.pth --checkpoint-key params_ema --prefix module.
"""
)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="ONNX file to write [CHECKPOINT with .onnx].")
@click.option("--family", help="Model family; recognised from the tensors by default.")
@click.option("--module", metavar="PKG.MOD:FACTORY", help="Your own module; the checkpoint is loaded into it.")
@click.option(
    "--checkpoint-key",
    "key",
    metavar="KEY",
    help="Entry of CHECKPOINT that holds the weights, such as params_ema or ema.module; found where it is unique.",
)
@click.option(
    "--prefix",
    metavar="PREFIX",
    help="Take the tensors whose names start with it, such as module.update_block.; found where it is unique.",
)
@click.option(
    "--max-expansion",
    type=click.FloatRange(1),
    default=8.0,
    show_default=True,
    metavar="N",
    help="Refuse a CHECKPOINT that unpacks to more than N times its size (and to more than 256 MiB).",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Argument of the family or factory; JSON or Python."
)
@click.option(
    "--shape",
    multiple=True,
    callback=joined,
    metavar="x:1x3x256x256",
    help="Fix the sizes of a data input; without it all are dynamic.",
)
@click.option("--dynamic", metavar="batch,height,width", help="Sizes that stay dynamic although --shape is given.")
@click.option(
    "--state",
    "returned",
    multiple=True,
    metavar="NAME=POSITION",
    help="With --module: the argument NAME takes what forward returned at POSITION; not needed where it is last.",
)
@pixel_options
@pixel_dtype_option
@click.option("--precision", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option(
    "--state-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the hidden state between steps; float16 loses small updates.",
)
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset, 18 to 23.")
@click.option(
    "--plain", is_flag=True,
    help="Cells in standard operators, for OpenVINO, tract, ncnn, IREE and others; see docs/interop.md.",
)  # fmt: skip
@click.option("--list-families", is_flag=True, is_eager=True, expose_value=False, callback=_list_families)
@overwrite_option
@json_option
def command(
    checkpoint: Path | None,
    output: Path | None,
    family: str | None,
    module: str | None,
    key: str | None,
    prefix: str | None,
    max_expansion: float,
    settings: Sequence[str],
    shape: str | None,
    dynamic: str | None,
    returned: Sequence[str],
    precision: Any,
    state_dtype: Any,
    opset: int,
    plain: bool,
    overwrite: bool,
    as_json: bool,
    **pixel_arguments: Any,
) -> None:
    """Export CHECKPOINT as a single-step ONNX model with explicit hidden state.

    The file is compared with the PyTorch model over 32 steps, state fed back, before it is written. If it computes
    something else, or errs more than its rounding explains, the exit code is 3 and no file is written.
    """
    if checkpoint is None and module is None:
        raise click.UsageError("Missing argument 'CHECKPOINT'.")
    if family is not None and module is not None:
        raise UsageError("--family and --module: give one of them, got both")
    if output is None:
        output = Path(checkpoint.name if checkpoint else module.rpartition(":")[2]).with_suffix(".onnx")  # type: ignore[union-attr]
    if checkpoint is None and (key is not None or prefix is not None):
        raise UsageError("--checkpoint-key, --prefix: choose weights in a checkpoint, and there is none")
    arguments = parse_settings(settings)
    convention = arguments.pop("events.convention", None)
    shapes = parse_shapes(shape, option="--shape") if shape else {}
    symbols = [symbol.strip() for symbol in dynamic.split(",")] if dynamic else []
    pixel_dtype = pop_pixel_dtype(pixel_arguments)
    pixels = pop_pixels(pixel_arguments)
    positions = _positions(returned)
    if positions and module is None:
        raise UsageError("--state: is for --module; a family knows its states")
    _require_torch()
    from stepcell.exporter import export_onnx, load_checkpoint
    from stepcell.models.step import is_step_module

    started = time.monotonic()
    with working(f"exporting {output}"):
        content = None
        reads: dict[str | Path, str] = {}
        if checkpoint is not None:
            content = load_checkpoint(checkpoint, key=key, prefix=prefix, max_expansion=max_expansion)
            reads[checkpoint] = "the checkpoint"
        check_output(output, is_exported_model, reads=reads, overwrite=overwrite)
        model, name, source = _load(content, family, module, arguments, shapes)
        if convention is not None:
            _set_convention(model, convention)
        lifted = None
        if not is_step_module(model):
            lifted = _lift_states(model, module, shapes, symbols, positions)
            source |= {"shapes": shapes} | ({"states": positions} if positions else {})
        contract = export_onnx(
            lifted or model,
            output,
            precision=precision,
            state_dtype=state_dtype,
            shapes=lifted.example_shapes if lifted else shapes,
            dynamic=symbols,
            pixels=pixels,
            pixel_dtype=pixel_dtype,
            opset=opset,
            plain=plain,
            family=name,
            source=source,
            overwrite=overwrite,
        )
    for line in lifted.describe(contract) if lifted else ():
        log(line)
    if state_dtype == "float16":
        log("note: a float16 state loses every update smaller than its last bit: at z = 0.001 it stalls at 76 %")
    assert contract.parity is not None
    worst = ", ".join(error_of(contract.parity, name) for name in contract.parity.max_abs_error)
    stage("export", output, time.monotonic() - started, f"max error over {contract.parity.steps} steps: {worst}")
    if found := bound(contract.parity):
        log(found if contract.parity.memory else f"warning: {found}")
    if as_json:
        print_json(contract)


def _set_convention(model: nn.Module, convention: object) -> None:
    """`--set events.convention=tonic`: how the events of the model's inputs are distributed over the bins."""
    inputs = getattr(model, "inputs", [])
    if convention not in ("published", "tonic"):
        raise UsageError(f"--set events.convention: expected published or tonic, got {convention}")
    if not any(spec.events for spec in inputs):
        raise UsageError("--set events.convention: the model takes no events")
    if any(spec.events and spec.events.representation != "voxel_grid" for spec in inputs):
        raise UsageError("--set events.convention: only voxel grids have two, and the model takes another tensor")
    chosen = "tonic" if convention == "tonic" else msgspec.UNSET
    changed = [
        msgspec.structs.replace(spec, events=msgspec.structs.replace(spec.events, convention=chosen))
        if spec.events
        else spec
        for spec in inputs
    ]
    try:
        model.inputs = changed  # type: ignore[assignment]  # a list of specs, as the protocol says
    except AttributeError as error:  # a property
        raise UsageError(
            "--set events.convention: the module declares its inputs itself", hint="EventSpec(..., convention='tonic')"
        ) from error


def _load(
    checkpoint: Checkpoint | None,
    family: str | None,
    module: str | None,
    arguments: dict[str, Any],
    shapes: dict[str, Any],
) -> tuple[nn.Module, str, dict[str, object]]:
    from stepcell.exporter.from_checkpoint.step_model import family_model, load_weights
    from stepcell.exporter.from_module.factory import module_from_factory

    if module is None:
        assert checkpoint is not None
        loaded = family_model(checkpoint, family, arguments, shapes)
        used = loaded.arguments
        log(f"family:  {loaded.family} ({', '.join(f'{key}={value}' for key, value in used.items())})")
        return loaded.model, loaded.family, {"checkpoint_sha256": checkpoint.sha256, **loaded.source, "arguments": used}
    model = module_from_factory(module, arguments)
    source: dict[str, object] = {"module": module, "arguments": arguments}
    if checkpoint is not None:
        source |= {"checkpoint_sha256": checkpoint.sha256, **load_weights(model, checkpoint, f"--module {module}")}
    return model, "module", source


def _lift_states(
    model: nn.Module, module: str | None, shapes: dict[str, Any], dynamic: list[str], positions: dict[str, int]
) -> LiftedModel:
    from stepcell.exporter import lift_states

    if not shapes:
        raise UsageError(
            f"--module {module}: {type(model).__name__} lists no inputs and states, so it is called to find them: "
            "needs --shape with the shape of each data input",
            hint="such as --shape x:1x3x64x64; see docs/own-module.md",
        )
    return lift_states(model, shapes, dynamic=dynamic, returned=positions)


def _positions(returned: Sequence[str]) -> dict[str, int]:
    positions: dict[str, int] = {}
    for text in returned:
        name, _, position = text.partition("=")
        if not name or not position.lstrip("-").isdecimal():
            raise UsageError(f"--state: expected NAME=POSITION, got {text!r}", hint="such as --state h=1")
        if name in positions:
            raise UsageError(f"--state {name}: given twice")
        positions[name] = int(position)
    return positions


def _require_torch() -> None:
    for package in ("torch", "onnx", "onnxscript", "safetensors", "onnxruntime"):
        require(package, extra="export", purpose="`stepcell export`")
