"""StepLoop in ncnn against StepLoop in ONNX Runtime on the CPU: time, error over many fed-back steps, idle rows.

    python benchmarks/ncnn_step.py --output benchmarks/results/ncnn_step.json
    python benchmarks/ncnn_step.py --table benchmarks/results/ncnn_step.json

Both step the same file with the same number of threads in one process, in rounds of some steps in random order; ratios
are taken within a round, so that other load on the machine affects both. Errors are those of outputs and states against
the module in float64, at a smaller size, since they do not depend on it. The result is a JSON file with all figures,
and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from loop import settle
from loop_cases import Case, Shape, make_case
from loops import reference
from numpy.typing import NDArray

import stepcell
from stepcell import StepLoop
from stepcell.cli.console import log
from stepcell.errors import UsageError
from stepcell.files import read_bytes, write_atomic
from stepcell.machine import cpu_name
from stepcell.optional_imports import require

Array = NDArray[Any]
BACKENDS = ("onnxruntime", "ncnn")
SHAPES = [
    Shape("32 to 64, 64x64", "ConvGRU 32 to 64", (1, 32, 64, 64)),
    Shape("64 to 64, 128x128", "ConvGRU 64 to 64", (1, 64, 128, 128)),
    Shape("32 to 64, 180x320", "ConvGRU 32 to 64", (1, 32, 180, 320)),
    Shape("denoiser, 320x240", "denoiser", (1, 3, 240, 320)),
    Shape("denoiser, 176x144", "denoiser", (1, 3, 144, 176)),
    Shape("5 to 32, 8x8, batch 16", "ConvGRU 5 to 32", (16, 5, 8, 8)),
]
SMALL = {"denoiser": (1, 3, 72, 88)}  # size for errors; cells have 32 x 32
ROUND_SECONDS = 0.06  # of steps of ONNX Runtime


def opened(case: Case, backend: str, **options: Any) -> StepLoop:
    """The file of a case in one back end."""
    return StepLoop.open(case.exported, threads=case.threads, backend=backend, **options)


def rounds_of(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step of each, in every round."""
    for step in steps.values():
        step()
    started = time.perf_counter()
    next(iter(steps.values()))()
    count = max(2, round(ROUND_SECONDS / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            settle()
            steps[name]()
            started = time.perf_counter()
            for _ in range(count):
                steps[name]()
            times[name].append(round((time.perf_counter() - started) / count * 1e3, 5))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """25%, median and 75%."""
    return [round(float(value), 3) for value in np.percentile(values, (25, 50, 75))]


def timed(shape: Shape, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """One shape with each back end."""
    case = make_case(shape, folder, threads)
    x = np.random.default_rng(0).random(shape.frame, np.float32)
    loops = {backend: opened(case, backend) for backend in BACKENDS}
    times = rounds_of({name: partial(loop.step, x=x) for name, loop in loops.items()}, rounds)
    ratios = [ours / theirs for ours, theirs in zip(times["onnxruntime"], times["ncnn"], strict=True)]
    with opened(case, "auto") as loop:
        loop.step(x=x)
        chosen = loop.description
    for each in loops.values():
        each.close()
    return {"name": shape.name, "milliseconds": times, "times_as_fast": quartiles(ratios), "auto": chosen}


def errors_of(shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """Root mean square errors of the output over many steps, the largest and that of the last step."""
    frame = SMALL.get(shape.model, (1, shape.frame[1], 32, 32))
    case = make_case(Shape(shape.name, shape.model, frame), folder, 1)
    exact, loops = reference(case), {backend: opened(case, backend) for backend in BACKENDS}
    rng, found = np.random.default_rng(0), {backend: [] for backend in BACKENDS}  # type: ignore[var-annotated]
    still = rng.random(frame, np.float32)
    for _ in range(steps):
        x = (0.8 * still + 0.2 * rng.random(frame, np.float32)).astype(np.float32)
        expected = exact(x)
        for backend, loop in loops.items():
            found[backend].append(float(np.sqrt(np.mean((loop.step(x=x)["y"] - expected) ** 2))))
    for each in loops.values():
        each.close()
    worst = {backend: max(errors) for backend, errors in found.items()}
    return {
        "model": shape.model,
        "frame": frame,
        "steps": steps,
        "worst_rms": worst,
        "last_rms": {backend: errors[-1] for backend, errors in found.items()},
        "ratio": round(worst["ncnn"] / worst["onnxruntime"], 3),
    }


def idle_rows(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Time of a step of 8 slots with 2 frames, as a share of that with 8."""
    shape = Shape("8 slots", "ConvGRU 32 to 64", (1, 32, 64, 64))
    case = make_case(shape, folder, threads)
    x = {"x": np.random.default_rng(0).random(shape.frame, np.float32)}
    steps: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        loop = opened(case, backend, slots=8)
        slots = [loop.attach() for _ in range(8)]
        for count in (8, 2):
            steps[f"{backend} {count}"] = partial(loop.step_slots, dict.fromkeys(slots[:count], x))
    times = rounds_of(steps, rounds)
    shares = {
        backend: quartiles([few / all_ for few, all_ in zip(times[f"{backend} 2"], times[f"{backend} 8"], strict=True)])
        for backend in BACKENDS
    }
    return {"milliseconds": times, "share_of_2_in_8": shares}


def measure(shapes: Sequence[Shape], threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """All of it."""
    torch.set_num_threads(1)
    ncnn = require("ncnn", extra="ncnn", purpose="this benchmark")
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "stepcell": stepcell.__version__,
            "onnxruntime": onnxruntime.__version__,
            "ncnn": ncnn.__version__,
        },
        "load_before": os.getloadavg(),
        "shapes": [],
        "errors": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder)  # choices are made anew
        for shape in shapes:
            result["shapes"].append(timed(shape, folder, threads, rounds))
            log(f"{shape.name}: {result['shapes'][-1]['times_as_fast'][1]} times as fast")
        result["idle"] = idle_rows(folder, threads, rounds)
        for model in dict.fromkeys(shape.model for shape in shapes):
            shape = next(shape for shape in shapes if shape.model == model)
            result["errors"].append(errors_of(shape, folder, steps))
            log(f"{model}: error {result['errors'][-1]['ratio']} times that of ONNX Runtime")
    result["load_after"] = os.getloadavg()
    return result


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| | ncnn, times as fast (quartiles) | auto takes |", "|---|---|---|"]
    for shape in result["shapes"]:
        low, middle, high = shape["times_as_fast"]
        chosen = shape["auto"].partition(",")[0]
        lines.append(f"| {shape['name']} | {middle:.2f} ({low:.2f} to {high:.2f}) | {chosen} |")
    lines += ["", "| rms error to float64, the worst of all steps | ONNX Runtime | ncnn | ratio |", "|---|---|---|---|"]
    for error in result["errors"]:
        worst = error["worst_rms"]
        name = f"{error['model']}, {error['steps']} steps"
        lines.append(f"| {name} | {worst['onnxruntime']:.1e} | {worst['ncnn']:.1e} | {error['ratio']:.2f} |")
    shares = {backend: share[1] for backend, share in result["idle"]["share_of_2_in_8"].items()}
    load = result["load_before"][0], result["load_after"][0]
    lines += [
        "",
        f"A step of 8 slots with 2 frames takes {shares['ncnn']:.2f} of one with 8 in ncnn, "
        f"{shares['onnxruntime']:.2f} in ONNX Runtime.",
        "",
        f"{result['cpu']}, {result['cores']} cores, {result['threads']} threads; load average {load[0]:.1f} before, "
        f"{load[1]:.1f} after.",
    ]
    return "\n".join(lines) + "\n"


def svg(result: dict[str, Any]) -> str:
    """Bars of the speed, with a line at that of ONNX Runtime."""
    height, left, unit = 22 * len(result["shapes"]) + 34, 190, 180
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" font-family="sans-serif" ']
    parts.append('font-size="12"><rect width="100%" height="100%" fill="white"/>')
    for row, shape in enumerate(result["shapes"]):
        low, middle, high = (min(value, 2.4) * unit for value in shape["times_as_fast"])
        y = 22 * row + 8
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(shape["name"])}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{middle:.1f}" height="15" fill="#76b900"/>')
        parts.append(f'<path d="M{left + low:.1f} {y + 7.5}H{left + high:.1f}" stroke="black"/>')
        parts.append(f'<text x="{left + max(middle, high) + 6:.1f}" y="{y + 12}">{middle / unit:.2f}</text>')
    parts.append(f'<path d="M{left + unit} 4V{height - 24}" stroke="#4a6fa5" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{left + unit}" y="{height - 8}" text-anchor="middle">1: ONNX Runtime</text></svg>\n')
    return "".join(parts)


def main() -> None:
    """Measure, or show a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("ncnn_step.json"))
    parser.add_argument("--table", type=Path, help="show a result, and measure nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1000, help="of the errors")
    parser.add_argument("--quick", action="store_true", help="one shape, 2 rounds and 5 steps")
    arguments = parser.parse_args()
    if arguments.table is not None:
        sys.stdout.write(table(json.loads(read_bytes(arguments.table))))
        return
    if min(arguments.threads, arguments.rounds - 1, arguments.steps) < 1:
        raise UsageError("expected at least 2 rounds, 1 thread and 1 step")
    if arguments.quick:
        result = measure(SHAPES[-1:], arguments.threads, 2, 5)
    else:
        result = measure(SHAPES, arguments.threads, arguments.rounds, arguments.steps)
    write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")
    write_atomic(arguments.output.with_suffix(".svg"), svg(result))
    sys.stdout.write(table(result))


if __name__ == "__main__":
    main()
