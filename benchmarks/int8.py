"""Benchmark of int8 models on the CPU: speed against float32, PSNR on a held-out clip, loss along many steps.

    python benchmarks/int8.py --other build/d3671d3 --output benchmarks/results/int8.json

The zoo's denoiser is calibrated on its two training clips and judged on a third, whose frames without noise are known;
a ConvGRU of 64 channels has random weights and frames, and only its speed means something. Both forms of a model make
a few steps in every round, in random order, and ratios are taken within a round. With --other, the float32 model also
runs in another version of stepcell, installed as other_version.py says. The result is a JSON file with all times, and a
plot of the loss beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from loop import settle
from numpy.typing import NDArray
from other_version import OtherVersion, random_frames

import stepcell
from stepcell import StepLoop, export_onnx
from stepcell.cli.console import log
from stepcell.exporter import load_checkpoint, step_model
from stepcell.exporter.quantize import quantize
from stepcell.exporter.quantize.quantize import MAX_LOSS
from stepcell.files import write_atomic
from stepcell.models import CellStack, ConvGRUCell
from stepcell.models.zoo import denoiser
from stepcell.models.zoo.clips import HELD_OUT, TRAINING, add_noise, psnr, read_clip
from stepcell.onnx_model import read_onnx
from stepcell.quantization import Quantization

SIGMA, SEED = 25.0, 2026  # noise of 0 to 255, as models/zoo/evaluate_denoiser.py has it
WINDOW = 100  # steps over which the loss along a long run is taken together

Array = NDArray[Any]


def as_input(frame: Array) -> Array:
    """A frame (H, W, 3) of bytes as (1, 3, H, W) in 0 to 1."""
    return np.ascontiguousarray(frame.transpose(2, 0, 1)[None]).astype(np.float32) / np.float32(255)


def as_pixels(y: Array) -> Array:
    """The reverse, rounded and clipped."""
    return np.rint(np.clip(y[0], 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def make_denoiser(folder: Path, max_loss: float) -> tuple[Path, Path]:
    """The zoo's denoiser, and its int8 form, calibrated on the noisy training clips."""
    checkpoint = load_checkpoint(Path(denoiser.__file__).with_name("denoiser.safetensors"))
    wide, small = folder / "denoiser.onnx", folder / "denoiser-int8.onnx"
    export_onnx(step_model(checkpoint)[0], wide)
    clips = []
    for number, name in enumerate(TRAINING):
        frames = read_clip(name, shrink=4)[:64]
        height, width = (size // 2 * 2 for size in frames.shape[1:3])
        clips.append(str(folder / f"{name}.npy"))
        np.save(clips[-1], add_noise(frames[:, :height, :width], SIGMA, number))
    quantize(wide, small, clips, max_loss=max_loss, progress=log)
    return wide, small


def make_cell(folder: Path) -> tuple[Path, Path]:
    """A ConvGRU of 64 to 64 channels with random weights, and its int8 form."""
    torch.manual_seed(0)
    wide, small = folder / "cell.onnx", folder / "cell-int8.onnx"
    export_onnx(CellStack([ConvGRUCell(64, 64)]).eval(), wide)
    rng = np.random.default_rng(0)
    frames = [{"x": rng.random((1, 64, 32, 32), np.float32)} for _ in range(16)]
    quantize(wide, small, [frames], max_loss=1, progress=log)
    return wide, small


def loss_of(path: Path) -> dict[str, Any]:
    """What the contract of an int8 model says of itself."""
    made = read_onnx(path).contract.quantization
    assert isinstance(made, Quantization)
    return {"layers": list(made.layers), "kept": list(made.kept), "loss": made.loss, "quantile": made.quantile}


def speed(
    pair: tuple[Path, Path], shape: tuple[int, ...], threads: int, rounds: int, steps: int, other: Path | None
) -> dict[str, Any]:
    """Milliseconds per step of both, and of the other version, in every round; quartiles of their ratios to int8."""
    frames = [frame for (frame,) in random_frames(4, [shape], 1)]
    loops = {name: StepLoop.open(path, threads=threads) for name, path in zip(("float32", "int8"), pair, strict=True)}
    timers: dict[str, Callable[[int, int], float]]
    timers = {name: functools.partial(milliseconds, loop, frames) for name, loop in loops.items()}
    before = None if other is None else OtherVersion(other, pair[0], (shape,), threads)
    if before is not None and other is not None:
        timers[f"float32 of {other.name}"] = before.milliseconds
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            settle()
            times[name].append(round(timers[name](steps, 1), 4))
    for loop in (*loops.values(), *([before] if before else ())):
        loop.close()
    ratios = {
        name: [round(float(r), 3) for r in np.percentile(np.array(each) / np.array(times["int8"]), [25, 50, 75])]
        for name, each in times.items()
        if name != "int8"
    }
    return {"shape": shape, "threads": threads, "milliseconds": times, "times as fast": ratios}


def milliseconds(loop: StepLoop, frames: list[Array], steps: int, warm_up: int) -> float:
    """Time per step."""
    clip = itertools.cycle(frames)
    for _ in range(warm_up):
        loop.step(x=next(clip))
    started = time.perf_counter()
    for _ in range(steps):
        loop.step(x=next(clip))
    return (time.perf_counter() - started) / steps * 1e3


def quality(pair: tuple[Path, Path]) -> dict[str, Any]:
    """PSNR in dB of both against the clean held-out clip, and of the noisy clip."""
    clean = read_clip(HELD_OUT)
    noisy = add_noise(clean, SIGMA, SEED)
    found = {"noisy": psnr(noisy, clean)}
    for name, path in zip(("float32", "int8"), pair, strict=True):
        with StepLoop.open(path) as loop:
            found[name] = psnr(np.stack([as_pixels(loop.step(x=as_input(frame))["y"]) for frame in noisy]), clean)
    return {name: round(value, 3) for name, value in found.items()}


def along(pair: tuple[Path, Path], steps: int) -> list[float]:
    """The rms difference of the outputs, states fed back all the time, for every 100 steps of a clip to and fro."""
    noisy = add_noise(read_clip(HELD_OUT), SIGMA, SEED)
    there_and_back = itertools.cycle([*noisy, *noisy[-2:0:-1]])
    squares: list[float] = []
    with StepLoop.open(pair[0]) as wide, StepLoop.open(pair[1]) as small:
        for frame in itertools.islice(there_and_back, steps):
            x = as_input(frame)
            squares.append(float(np.mean((wide.step(x=x)["y"] - small.step(x=x)["y"]) ** 2)))
    windows = [squares[start : start + WINDOW] for start in range(0, steps, WINDOW)]
    return [round(float(np.sqrt(np.mean(window))), 6) for window in windows]


def svg(result: dict[str, Any]) -> str:
    """The loss along the steps."""
    losses, steps = result["rms difference"], result["steps"]
    width, height, left, bottom, top = 720, 300, 70, 250, 50
    most = 1.1 * max(losses)
    points = " ".join(
        f"{left + (width - left - 20) * (i + 0.5) / len(losses):.1f},{bottom - (bottom - top) * loss / most:.1f}"
        for i, loss in enumerate(losses)
    )
    marks = [
        f'<text x="{left - 6}" y="{bottom - (bottom - top) * part + 4:.0f}" text-anchor="end">{most * part:.4f}</text>'
        for part in (0, 0.5, 1)
    ]
    speeds = "; ".join(
        f"{each['model']} {'x'.join(map(str, each['shape'][2:]))}, {each['threads']} threads: "
        f"{each['times as fast']['float32'][1]:.2f} times as fast"
        for each in result["speed"]
    )
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
                ' font-size="12">',
                '<rect width="100%" height="100%" fill="white"/>',
                '<text x="4" y="18" font-size="15">Difference of the int8 denoiser to float32, rms, signal of 0 to 1'
                "</text>",
                f'<text x="4" y="36" fill="#666">{speeds}</text>',
                *marks,
                f'<line x1="{left}" x2="{width - 20}" y1="{bottom}" y2="{bottom}" stroke="black"/>',
                f'<polyline points="{points}" fill="none" stroke="#76b900" stroke-width="2"/>',
                f'<text x="{left}" y="{bottom + 18}">0</text>',
                f'<text x="{width - 20}" y="{bottom + 18}" text-anchor="end">{steps:,} steps, states fed back</text>',
                "</svg>",
            ]
        )
        + "\n"
    )


def measure(rounds: int, steps: int, max_loss: float, other: Path | None) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair, cell = make_denoiser(folder, max_loss), make_cell(folder)
        speeds = [
            {"model": model, **speed(files, shape, threads, rounds, 10, other)}
            for threads in (1, 2)
            for model, files, shape in (
                ("denoiser", pair, (1, 3, 240, 320)),
                ("ConvGRU 64 to 64", cell, (1, 64, 128, 128)),
            )
        ]
        return {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "python": platform.python_version(),
                "stepcell": stepcell.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
            "load": os.getloadavg(),
            "denoiser": loss_of(pair[1]),
            "speed": speeds,
            "psnr": quality(pair),
            "steps": steps,
            "rms difference": along(pair, steps),
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Time and judge int8 models on the CPU.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/int8.json"), help="JSON; .svg beside it"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10_000, help="of the run along which the loss is measured")
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="with the package stepcell of another version")
    parser.add_argument("--max-loss", type=float, default=MAX_LOSS, help="as of `stepcell quantize`")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.steps, arguments.max_loss, arguments.other)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")
    write_atomic(arguments.output.with_suffix(".svg"), svg(result))
    for each in result["speed"]:
        for name, (low, middle, high) in each["times as fast"].items():
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f}) times as fast as {name}"
            sys.stdout.write(f"{each['model']}, {each['threads']} threads: {ratio}\n")
    sys.stdout.write(f"PSNR in dB: {result['psnr']}; loss: {result['denoiser']['loss']}\n")


if __name__ == "__main__":
    main()
