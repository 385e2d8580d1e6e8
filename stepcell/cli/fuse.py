"""`stepcell fuse`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stepcell.cli.common import joined, json_option, overwrite_option
from stepcell.cli.console import log, print_json, stage, table, working
from stepcell.cli.parity import bound, error_of
from stepcell.cli.pixel_options import pixel_dtype_option, pixel_options, pop_pixel_dtype, pop_pixels
from stepcell.errors import UsageError
from stepcell.optional_imports import require
from stepcell.shapes import parse_shapes

if TYPE_CHECKING:
    from stepcell.exporter.from_onnx.fuse import FuseReport


@click.command(
    epilog="""\b
Examples:
  stepcell fuse model.onnx -o fused.onnx --range 0,1
  stepcell fuse model.onnx -o fused.onnx --state mem_a=trace_p --state mem_b=trace_q
  stepcell fuse model.onnx -o fused.onnx --shape src:1x3x256x256
  stepcell fuse --contract model.onnx simplified.onnx -o repaired.onnx
  stepcell fuse exported.onnx -o bytes.onnx --pixels uint8
  stepcell fuse matting.onnx -o fused.onnx --constant downsample_ratio=0.25
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="ONNX file to write.")
@click.option(
    "--state",
    "states",
    multiple=True,
    metavar="IN=OUT",
    help="Output OUT is the next value of input IN; an empty OUT: IN is no state.",
)
@click.option("--stateless", is_flag=True, help="No input is a state: every step is computed from its inputs alone.")
@click.option(
    "--constant",
    "constants",
    multiple=True,
    metavar="NAME=VALUE",
    help="Replace input NAME by a constant, such as downsample_ratio=0.25.",
)
@click.option(
    "--value",
    "values",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of input NAME in steps that do not give it; it stays an input.",
)
@click.option(
    "--shape",
    multiple=True,
    callback=joined,
    metavar="x:1x3x256x256",
    help="Fix the sizes of an input; without it all stay as they are.",
)
@click.option(
    "--contract", type=click.Path(path_type=Path), metavar="ORIGINAL",
    help="MODEL was exported as ORIGINAL and changed by another tool since: bring the contract back.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(0, min_open=True), metavar="T",
    help="With --contract, the relative difference to ORIGINAL that is allowed, such as of a quantised file.",
)  # fmt: skip
@pixel_options
@pixel_dtype_option
@overwrite_option
@json_option
def command(
    model: Path,
    output: Path,
    states: Sequence[str],
    stateless: bool,
    constants: Sequence[str],
    values: Sequence[str],
    shape: str | None,
    contract: Path | None,
    tolerance: float | None,
    overwrite: bool,
    as_json: bool,
    **pixel_arguments: Any,
) -> None:
    """Convert MODEL, an ONNX file of one step that another program exported.

    States are found by name and in the graph, recurrent cells become one op each, and
    the state contract is written into the file. The result is compared with MODEL over 100 steps
    before it is written. If it computes something else, the exit code is 3 and no file is written.

    In a MODEL that has a contract already, --range, --mean, --std, --channels and --layout change what it says of
    pictures, --value what an input has in steps that do not give it, --pixels uint8 puts the conversion of pixels into
    its graph, and nothing else is changed.
    """
    pixel_dtype = pop_pixel_dtype(pixel_arguments)
    pixels = pop_pixels(pixel_arguments)
    pairs = _parse_states(states)
    fixed, kept = _parse_values(constants, "--constant"), _parse_values(values, "--value")
    if both := sorted(fixed.keys() & kept.keys()):
        raise UsageError(f"--constant {both[0]} and --value {both[0]}: give one of the two")
    shapes = parse_shapes(shape, option="--shape") if shape else {}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export", purpose="`stepcell fuse`")
    from stepcell.exporter.from_onnx.fuse import fuse

    started = time.monotonic()
    with working(f"fusing {model}"):
        report = fuse(
            model,
            output,
            states=pairs,
            shapes=shapes,
            contract=contract,
            tolerance=tolerance,
            stateless=stateless,
            constants=fixed,
            values=kept,
            pixels=pixels,
            pixel_dtype=pixel_dtype,
            overwrite=overwrite,
        )
    if report.redeclared:
        detail = "only the contract was changed"
        if pixel_dtype != "float":
            detail = f"pixels are converted in the graph: {report.nodes_before} -> {report.nodes_after} nodes"
        stage("fuse", output, time.monotonic() - started, detail)
        if as_json:
            print_json(report)
        return
    _print_report(report)
    parity = report.contract.parity
    detail = f"{report.nodes_before} -> {report.nodes_after} nodes"
    if parity is not None and parity.max_abs_error:
        worst = max(parity.max_abs_error.values())
        detail += f", max error over {parity.steps} steps: {worst:.1e}"
        shares = {name: error_of(parity, name) for name in parity.differing if parity.max_abs_error[name]}
        detail += "".join(f", {share}" for share in shares.values())
    stage("fuse", output, time.monotonic() - started, detail)
    if parity is not None and (found := bound(parity)):
        log(found if parity.memory else f"warning: {found}")
    if as_json:
        print_json(report)


def _parse_states(states: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for state in states:
        source, equals, target = state.partition("=")
        if not equals or not source:
            raise UsageError(f"--state: expected IN=OUT, got {state!r}", hint="such as --state h_in=h_out")
        if source in pairs:
            raise UsageError(f"--state {source}: given twice")
        pairs[source] = target
    return pairs


def _parse_values(texts: Sequence[str], option: str) -> dict[str, list[float | int | bool]]:
    """Numbers by input, of NAME=1,0.5,true."""
    found: dict[str, list[float | int | bool]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        numbers = numbers.strip()
        if numbers[:1] + numbers[-1:] in ("[]", "()"):  # as Python and NumPy print them
            numbers = numbers[1:-1].rstrip(", ")
        if name in found:
            raise UsageError(f"{option} {name}: given twice")
        try:
            found[name] = [_number(number.strip()) for number in numbers.split(",")]
        except ValueError:
            raise UsageError(
                f"{option}: expected NAME=VALUE with numbers, got {text!r}",
                hint=f"such as {option} {name or 'downsample_ratio'}=0.25; several in C order: 0.5,0.25; true and "
                "false are booleans",
            ) from None
    return found


def _number(text: str) -> float | int | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _print_report(report: FuseReport) -> None:
    contract = report.contract
    if contract.states:
        rows = [
            [
                state.name,
                str(state.original_input or state.input),
                str(state.original_output or state.output),
                " x ".join(map(str, state.shape)) or "1",
                "one" if state.batch_axis is None else f"{state.streams}, on axis {state.batch_axis}",
            ]
            for state in contract.states
        ]
        table("states", ["name", "input was", "output was", "shape", "streams"], rows)
    else:
        log("states   none: steps are independent")
    if contract.cells:
        rows = [
            [
                cell.name,
                cell.op or f"left as it is: {cell.reason}",
                str(cell.hidden),
                f"{cell.kernel[0]}x{cell.kernel[1]}",
                report.transforms.get(cell.name, ""),
            ]
            for cell in contract.cells
        ]
        table("cells", ["name", "op", "hidden", "kernel", "weights"], rows)
    for note in report.notes:
        log(f"note: {note}")
    for warning in report.warnings:
        log(f"warning: {warning}")
