"""`stepcell quantize`: options for `quantize`, and what is printed."""

from __future__ import annotations

import time
from pathlib import Path

import click

from stepcell.cli.common import json_option, overwrite_option
from stepcell.cli.console import log, print_json, stage, working

FRAMES, MAX_LOSS = 64, 0.019  # the defaults of `quantize`, which takes a second to import


@click.command(
    epilog="""\b
Examples:
  stepcell quantize model.onnx -o int8.onnx --calibrate clip.mp4
  stepcell quantize model.onnx -o int8.onnx --calibrate day.mp4 --calibrate night.mp4 --max-loss 0.01
  stepcell quantize model.onnx -o int8.onnx --calibrate frames/ --keep decoder/Conv --json
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option(
    "--calibrate", "clips", multiple=True, metavar="CLIP",
    help="A clip like those of the stream: a video, a folder of pictures or a .npy; several times for several.",
)  # fmt: skip
@click.option("--frames", type=click.IntRange(8), default=FRAMES, show_default=True, help="Frames taken of each clip.")
@click.option(
    "--keep", multiple=True, metavar="NAME", help="A convolution that stays in float32; several times for several."
)
@click.option(
    "--max-loss", type=click.FloatRange(0, min_open=True), default=MAX_LOSS, show_default=True, metavar="F",
    help="Largest rms difference of an output to float32, relative to its standard deviation.",
)  # fmt: skip
@overwrite_option
@json_option
def command(
    model: Path,
    output: Path,
    clips: tuple[str, ...],
    frames: int,
    keep: tuple[str, ...],
    max_loss: float,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write an int8 form of MODEL for faster steps; its states stay in float32.

    Convolutions get int8 weights, inputs and outputs. Ranges are measured on the clips with states fed back from frame
    to frame, and the loss on the last quarter of every clip. Layers stay in float32 until --max-loss holds; if it
    cannot, the exit code is 3 and no file is written.
    """
    from stepcell.exporter.quantize import quantize
    from stepcell.quantization import Quantization

    started = time.monotonic()
    with working(f"quantising {model}"):
        contract = quantize(
            model, output, clips, keep=keep, max_loss=max_loss, frames=frames, overwrite=overwrite, progress=log
        )
    made = contract.quantization
    assert isinstance(made, Quantization)
    worst = ", ".join(
        f"{name} {loss:.2%}" + (f" ({made.psnr[name]:.1f} dB)" if name in made.psnr else "")
        for name, loss in made.loss.items()
    )
    layers = f"{len(made.layers)} of {len(made.layers) + len(made.kept)} convolutions in int8"
    stage("quantize", output, time.monotonic() - started, f"{layers}; loss: {worst}")
    if as_json:
        print_json(contract)
