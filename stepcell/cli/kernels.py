"""Command `stepcell kernels`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from stepcell.cli.common import json_option
from stepcell.cli.console import log, print_json
from stepcell.errors import InputError
from stepcell.files import human_size
from stepcell.plugins.kernels.cell_config import CellConfig


@click.group()
def command() -> None:
    """Compile the fused gate kernels of the TensorRT plugin."""


@command.command(
    name="compile",
    epilog="""\b
Examples:
  stepcell kernels compile model.onnx --compute-capability 8.7
  stepcell kernels compile --compute-capability 8.0,8.6,8.7,8.9,9.0,10.0,11.0,12.0 -o kernels
  stepcell kernels compile --compute-capability 8.7,9.0 --cell gru_x32_h64_k3x3_soft_float32 -o kernels
""",
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--compute-capability", required=True, metavar="8.7,8.9", help="GPUs to compile for.")
@click.option(
    "--cell",
    "labels",
    multiple=True,
    metavar="LABEL",
    help="Cell to compile, such as gru_x32_h64_k3x3_soft_float32; may be given several times.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder [the user's cache].")
@json_option
def compile_command(
    model: Path | None, compute_capability: str, labels: tuple[str, ...], output: Path | None, as_json: bool
) -> None:
    """Compile kernels to machine code; the GPUs need not be present.

    Compiles the kernels of the cells in MODEL, a file that `stepcell export` wrote, and of every --cell; without
    both, those of a set of typical cells. Existing kernels are not compiled again. Needs Triton (stepcell[kernels]).
    """
    from stepcell.plugins.kernels.store import default_folder, images_for, wanted
    from stepcell.plugins.kernels.typical import TYPICAL

    named = [*(_cells_of(model) if model else []), *(CellConfig.from_label(label) for label in labels)]
    cells: list[tuple[CellConfig, int | None]] = [(cell, None) for cell in dict.fromkeys(named)] or list(TYPICAL)
    capabilities = list(dict.fromkeys(word.strip() for word in compute_capability.split(",")))
    folder = output or default_folder()
    total = sum(len(wanted(cell, each, pixels)) for each in capabilities for cell, pixels in cells)
    done, started, rows = 0, time.perf_counter(), []
    for capability in capabilities:
        for cell, pixels in cells:
            for image in images_for(cell, capability, folder, pixels):
                done += 1
                info = image.info
                log(
                    f"[{done}/{total}] {info.kernel:<14} {capability:>4}  {info.tile:<14} {info.registers:>3} registers"
                    f" {human_size(info.shared_bytes):>8} shared {human_size(len(image.cubin)):>8}  {cell.label}"
                )
                rows.append({"key": info.key, "kernel": info.kernel, "cell": cell.label, "tile": info.tile})
    log(f"{total} kernels in {folder}, {time.perf_counter() - started:.1f} s")
    if as_json:
        print_json({"folder": str(folder), "kernels": rows})


def _cells_of(path: Path) -> list[CellConfig]:
    """The cells of an exported model."""
    from stepcell.onnx_model import read_onnx
    from stepcell.plugins.onnx.rewrite import plugin_model

    cells = [cell for _, cell in plugin_model(read_onnx(path, check=False).model).cells]
    if not cells:
        raise InputError(
            f"{path}: has no stepcell::ConvGRU or stepcell::ConvLSTM node", hint="there is nothing to compile"
        )
    return cells
