"""Demonstration, run by `make demo`: exports, builds and runs the denoiser of the zoo.

Adds noise to a real clip that the denoiser was not trained on, calls `stepcell export`, `build` and `run`, and measures
the result. All files are written to `demo-output/`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import click
import cv2
import numpy as np
from numpy.typing import NDArray

from stepcell.cli.console import log, table
from stepcell.files import human_size, write_atomic
from stepcell.models.zoo.clips import HELD_OUT, add_noise, psnr, read_clip, read_frames

SIGMA = 25.0  # standard deviation of the noise, in 0 to 255
SEED = 2026
SHOWN = 60  # frame number of the comparison image
ZOOM = 2
CHECKPOINT = Path(__file__).parent.parent / "models" / "zoo" / "denoiser.safetensors"
SMALLEST, LARGEST = "x:1x3x64x64", "x:1x3x1080x1920"  # range of sizes of the engine

Frames = NDArray[np.uint8]


@click.command()
@click.option("--output", default="demo-output", type=click.Path(path_type=Path, file_okay=False), show_default=True)
def main(output: Path) -> None:
    """Run the demonstration."""
    output.mkdir(exist_ok=True)
    noisy, model, engine = output / "noisy.mkv", output / "denoiser.onnx", output / "denoiser.engine"
    denoised, report, picture = output / "denoised.mp4", output / "run.json", output / "comparison.png"

    clean = read_clip(HELD_OUT)
    height, width = clean.shape[1:3]
    write_lossless(noisy, add_noise(clean, SIGMA, SEED), Fraction(30000, 1001))
    seconds = {
        model: stepcell("export", CHECKPOINT, "-o", model),
        engine: stepcell(
            *("build", model, "-o", engine, "--flavor", "tensorrt-rtx"),
            *("--minShapes", SMALLEST, "--optShapes", f"x:1x3x{height}x{width}", "--maxShapes", LARGEST),
        ),
        denoised: stepcell("run", model, "--input", noisy, "--output", denoised, "--report", report),
    }
    before, after = read_frames(noisy), read_frames(denoised)
    compare(picture, before[SHOWN], after[SHOWN], clean[SHOWN])
    summarise(seconds, psnr(before, clean), psnr(after, clean), json.loads(report.read_text()))
    log(f"\nLook at {picture} and play {denoised}.")


def stepcell(*arguments: str | Path) -> float:
    """Run the command line in a process of its own; returns the seconds it took."""
    words = [str(argument) for argument in arguments]
    log(f"\n$ stepcell {' '.join(words)}")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "stepcell", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.monotonic() - started


def write_lossless(path: Path, frames: Frames, rate: Fraction) -> None:
    """Write frames as a lossless video (FFV1)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))


def compare(path: Path, *pictures: Frames) -> None:
    """Write an image of three frames side by side, enlarged and labelled: noisy, denoised, clean."""
    tiles = []
    for picture, name in zip(pictures, ("noisy", "denoised", "clean"), strict=True):
        tile = cv2.resize(picture, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_NEAREST)
        for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
            cv2.putText(tile, name, (10, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, colour, thickness, cv2.LINE_AA)
        tiles.append(tile)
    done, data = cv2.imencode(".png", cv2.cvtColor(np.hstack(tiles), cv2.COLOR_RGB2BGR))
    assert done
    write_atomic(path, data.tobytes())


def summarise(seconds: dict[Path, float], before: float, after: float, report: dict[str, object]) -> None:
    """Print the table of the files: size, time, quality."""
    notes: Sequence[str] = (
        "one step, hidden state as input and output",
        "float16 engine for RTX GPUs, built without one",
        f"PSNR {before:.2f} dB before, {after:.2f} dB after; {report['frames_per_second']:.0f} frames/s",
    )
    rows = [
        [str(path), human_size(path.stat().st_size), f"{took:.1f} s", note]
        for (path, took), note in zip(seconds.items(), notes, strict=True)
    ]
    log("")
    table("", ["file", "size", "time", ""], rows)


if __name__ == "__main__":
    main()
