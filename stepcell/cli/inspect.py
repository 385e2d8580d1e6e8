"""Command `stepcell inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from stepcell.cli.common import json_option
from stepcell.cli.console import echo, log, print_json, table
from stepcell.cli.parity import bound, error_of
from stepcell.contract import Spec, StepContract, TensorSpec
from stepcell.errors import InputError
from stepcell.files import human_size
from stepcell.nv12 import nv12_of
from stepcell.pixels import PixelConversion, picture_channels
from stepcell.quantization import Quantization

if TYPE_CHECKING:
    from stepcell.runtime.engine.sidecar import Sidecar


@click.command(
    epilog="""\b
Examples:
  stepcell inspect model.onnx
  stepcell inspect model.engine --json
"""
)
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def command(file: Path, as_json: bool) -> None:
    """Print inputs, outputs and states of FILE, an .onnx model or a TensorRT engine.

    A model is compared with its contract: what another tool changed since the export is listed. An engine is compared
    with its sidecar; TensorRT and a GPU are not needed.
    """
    from stepcell.onnx_model import changes_since_export, read_onnx, repair_hint
    from stepcell.runtime.engine.engine_check import read_engine

    if file.suffix.lower() == ".onnx":
        model = read_onnx(file, check=False)
        try:
            changes = changes_since_export(model)
        except InputError as error:
            changes = []
            log(f"warning: not compared with its contract: {error.message}")
        for change in changes:
            log(f"warning: changed since export: {change}")
        if changes:
            log(f"hint:    what is printed is the contract; bring it up to date: {repair_hint(file)}")
        if as_json:
            print_json({**msgspec.to_builtins(model.contract), "changed_since_export": changes})
        else:
            _print_contract(model.contract, f"{file}  {human_size(len(model.data))}  SHA-256 {model.sha256[:12]}...")
        return
    plan, sidecar = read_engine(file)
    if as_json:
        print_json(sidecar)
    else:
        _print_contract(sidecar.contract, f"{file}  {human_size(len(plan))}")
        _print_engine(sidecar)


def _print_contract(contract: StepContract, title: str) -> None:
    echo(title)
    echo(f"family {contract.family}, {contract.precision} compute, contract {contract.schema}\n")
    rows = [_row("input", spec.name, spec) for spec in contract.inputs]
    rows += [_row("output", spec.name, spec) for spec in contract.outputs]
    rows += [_row("state", state.name, state) for state in contract.states]
    table("", ["", "name", "shape", "dtype", "notes"], rows, to_stdout=True)
    if contract.cells:
        cells = []
        for cell in contract.cells:
            kind = cell.op or f"ordinary nodes: {cell.reason}"
            variant = [f"{cell.kernel[0]}x{cell.kernel[1]}", f"{cell.gates} gates"]
            variant += [f"reset {cell.reset}"] if cell.reset else []
            variant += ["peephole"] if cell.peephole else []
            cells.append([cell.name, kind, str(cell.hidden), ", ".join(variant)])
        table("\ncells", ["name", "op", "hidden", "variant"], cells, to_stdout=True)
    facts = [[key, _short(value)] for key, value in contract.source.items()]
    if contract.parity:
        parity = contract.parity
        how = f" ({parity.arithmetic})" if parity.arithmetic else ""
        worst = ", ".join(error_of(parity, name) for name in parity.max_abs_error)
        facts.append(["parity", f"{parity.steps} steps against {parity.reference}: max error {worst}{how}"])
        if found := bound(parity):
            facts.append(["error bound", found])
    if contract.quantization:
        facts += _quantization(contract.quantization)
    table("\nsource", ["", ""], facts, to_stdout=True)


def _quantization(made: Quantization) -> list[list[str]]:
    total = len(made.layers) + len(made.kept)
    clips = ", ".join(f"{clip.name} ({clip.frames} frames)" for clip in made.clips)
    loss = ", ".join(f"{name} {value:.2%}" for name, value in made.loss.items())
    kept = f"; in float32: {', '.join(made.kept)}" if made.kept else ""
    return [
        ["int8", f"{len(made.layers)} of {total} convolutions{kept}"],
        ["calibrated on", f"{clips}; {made.quantile:g} quantile, equalization {made.equalization:g}"],
        ["int8 loss", f"{loss} of the standard deviation"],
    ]


def _print_engine(sidecar: Sidecar) -> None:
    fingerprint = sidecar.fingerprint
    rows = [
        ["built with", f"{fingerprint.flavor} {fingerprint.tensorrt} on {fingerprint.platform}"],
        ["compute capability", ", ".join(fingerprint.compute_capabilities)],
        ["plugin", fingerprint.plugin_version or "none, native layers"],
        ["from", f"{sidecar.onnx}, SHA-256 {fingerprint.onnx_sha256[:12]}..."],
        ["plan", f"SHA-256 {fingerprint.plan_sha256[:12]}..., as in the sidecar"],
        ["build", f"{sidecar.build_seconds:.1f} s by stepcell {sidecar.stepcell}"],
    ]
    rows += [["verified", str(each)] for each in sidecar.verified] or [["verified", "never; `stepcell verify` does it"]]
    table("\nengine", ["", ""], rows, to_stdout=True)
    sizes = [
        [name, *("x".join(map(str, shape)) for shape in (profile.min, profile.opt, profile.max))]
        for name, profile in sidecar.profiles.items()
    ]
    table("\nsizes", ["name", "min", "opt", "max"], sizes, to_stdout=True)


def _row(kind: str, name: str, spec: Spec) -> list[str]:
    shape = " x ".join(str(dim) for dim in spec.shape)
    if not isinstance(spec, TensorSpec):
        was = f", was {spec.original_input} -> {spec.original_output}" if spec.original_input else ""
        alone = ", one stream" if spec.batch_axis is None else ""
        return [kind, name, shape, spec.dtype, f"{spec.input} -> {spec.output}, starts at {spec.init}{alone}{was}"]
    notes = _picture_notes(spec)
    if spec.range is None and picture_channels(spec) is not None and spec.dtype.startswith("float"):
        notes.insert(1, "range undefined")
    if how := nv12_of(spec):
        notes = [f"NV12, {how}"]
    if spec.converts:
        inside = ", ".join([spec.converts.dtype, *_picture_notes(spec.converts)])
        notes.append(f"converted in the graph {'to' if kind == 'input' else 'from'} ({inside})")
    if spec.events:
        notes.append(str(spec.events))
    if spec.value:
        notes.append(f"{', '.join(map(str, spec.value))} where it is not given")
    return [kind, name, shape, spec.dtype, ", ".join(filter(None, notes))]


def _picture_notes(picture: TensorSpec | PixelConversion) -> list[str]:
    notes = [picture.layout or ""]
    if picture.range is not None:
        notes.append(f"range {picture.range[0]:g} to {picture.range[1]:g}")
    for what, values in (("mean", picture.mean), ("std", picture.std)):
        if values is not None:
            notes.append(f"{what} {' '.join(f'{value:g}' for value in values)}")
    if picture.channels is not None:
        notes.append(picture.channels)
    if picture.pad_multiple > 1:
        notes.append(f"height, width multiples of {picture.pad_multiple}")
    return notes


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
