"""Benchmark of the step loop on the CPU: StepLoop and the loops that a user would write, in one process.

    python benchmarks/loop.py --output benchmarks/results/loop.json --document docs/performance.md
    python benchmarks/loop.py --table benchmarks/results/loop.json

All loops (benchmarks/loops.py) have the same weights and number of threads, and must agree with float64 over 32 steps
before they are timed. In every round each of them makes a few steps, in random order, so that other load on the machine
affects all of them; ratios are taken within a round. A matrix product with as many operations is timed in the same
rounds and shows the best rate of the processor. The result is a JSON file with all times, and a plot beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from loop_cases import SHAPES, Case, Shape, make_case
from loop_report import as_block, svg, table, with_block
from loops import BASELINE, FLOOR, LOOPS, Frame, Loop, matrix_product, reference

import stepcell
from stepcell.cli.console import log
from stepcell.errors import InputError, ParityError, StepcellError, UsageError
from stepcell.files import read_bytes, write_atomic

CHECKED, TOLERANCE = 32, 1e-4  # steps compared before the timing, and largest difference to float64
WARM_UP = 1  # steps of each loop at the start of a round that are not timed
ROUND_SECONDS = 0.03  # of timed steps of the baseline
SHAPE_SECONDS = 35  # no further round of a shape starts after this time, which matters on a busy machine
SETTLE_SECONDS = 0.3  # at most


def error_of(loop: Loop, frames: Frame, expected: Frame) -> float:
    """Largest difference over all frames, starting from the initial state; NaN if an output is NaN."""
    return float(np.max([np.abs(loop(x) - y).max() for x, y in zip(frames, expected, strict=True)]))


def checked_loops(case: Case, *, without: tuple[str, ...]) -> tuple[dict[str, Loop], dict[str, dict[str, Any]]]:
    """The loops that run on this machine, and for each its largest error or the reason why it does not run.

    Raises:
        ParityError: a loop differs from float64 by more than the tolerance.
    """
    frames = np.random.default_rng(0).random((CHECKED, *case.shape), np.float32)
    exact = reference(case)
    expected = np.stack([exact(x) for x in frames])
    loops: dict[str, Loop] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in LOOPS.items():
        if name in without:
            found[name] = {"not_run": "left out by --quick"}
            continue
        try:
            loop = make(case)
            error = error_of(loop, frames, expected)
        except RuntimeError as problem:  # torch.compile without a C++ compiler
            found[name] = {"not_run": str(problem).strip().splitlines()[0]}
            continue
        if not error <= TOLERANCE:
            raise ParityError(
                f"{name}: expected outputs within {TOLERANCE:g} of float64 over {CHECKED} steps, got {error:.1e}",
                hint="the loops do not compute the same, so their times mean nothing",
            )
        loops[name], found[name] = loop, {"error": error}
    return loops, found


def settle() -> None:
    """Wait until the threads of the previous loop have stopped spinning."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < deadline:
        wall, own = time.perf_counter(), time.process_time()
        time.sleep(0.003)
        if time.process_time() - own < 0.2 * (time.perf_counter() - wall):
            return


def milliseconds(loop: Loop, frames: list[Frame], steps: int) -> float:
    """Time per step, after warm-up steps. Every frame is an array of its own, as from a decoder."""
    clip = itertools.cycle(frames)
    for _ in range(WARM_UP):
        loop(next(clip))
    started = time.perf_counter()
    for _ in range(steps):
        loop(next(clip))
    return (time.perf_counter() - started) / steps * 1e3


def time_rounds(loops: dict[str, Loop], case: Case, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Steps per round, and for each loop the milliseconds per step in every round."""
    frames = list(np.random.default_rng(1).random((4, *case.shape), np.float32))
    once = min(milliseconds(loops[BASELINE], frames, 2) for _ in range(3))
    steps = max(2, round(ROUND_SECONDS * 1e3 / once))
    times: dict[str, list[float]] = {name: [] for name in loops}
    order, deadline = random.Random(0), time.perf_counter() + SHAPE_SECONDS
    for done in range(rounds):
        if done >= 2 and time.perf_counter() > deadline:
            break
        for name in order.sample(list(loops), len(loops)):
            settle()
            times[name].append(round(milliseconds(loops[name], frames, steps), 5))
    return steps, times


def measure(shapes: list[Shape], rounds: int, threads: int, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check and time every loop at every shape."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "stepcell": stepcell.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "load_before": os.getloadavg(),
        "shapes": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            case = make_case(shape, Path(folder), threads)
            loops, found = checked_loops(case, without=without)
            loops[FLOOR], found[FLOOR] = matrix_product(case), {}
            steps, times = time_rounds(loops, case, rounds)
            for name in times:
                found[name]["milliseconds"] = times[name]
            result["shapes"].append(
                {
                    "name": shape.name,
                    "model": shape.model,
                    "frame": shape.frame,
                    "rounds": len(times[BASELINE]),
                    "steps_per_round": steps,
                    "loops": found,
                }
            )
            log(f"{shape.name}: {len(times[BASELINE])} rounds of {steps} steps of {len(loops)} loops")
    result["load_after"] = os.getloadavg()
    return result


def _cpu() -> str:
    """Name of the processor from /proc/cpuinfo, or from Python if there is none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        result: dict[str, Any] = json.loads(read_bytes(path))
        table(result)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: expected a result of benchmarks/loop.py, got something else ({error})") from error
    return result


def run(arguments: argparse.Namespace) -> None:
    """Measure or read a result, write what was asked for, print the table."""
    picture = arguments.output.with_suffix(".svg")
    if arguments.table is not None:
        result, picture = read_result(arguments.table), arguments.table.with_suffix(".svg")
    else:
        if arguments.rounds < 2 or arguments.threads < 1:
            got = f"--rounds {arguments.rounds} --threads {arguments.threads}"
            raise UsageError(f"expected at least 2 rounds and 1 thread, got {got}")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        if arguments.quick:
            result = measure(SHAPES[:1], 2, arguments.threads, without=("torch.compile",))
        else:
            result = measure(SHAPES, arguments.rounds, arguments.threads)
        write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")
        write_atomic(picture, svg(result))
    if arguments.document is not None:
        block = as_block(result, os.path.relpath(picture, arguments.document.parent))
        write_atomic(arguments.document, with_block(read_bytes(arguments.document).decode(), block))
    sys.stdout.write(table(result))


def main() -> int:
    """Measure and write the result, or show an older one; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time StepLoop and the loops a user would write, on the CPU.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/loop.json"), help="JSON; .svg beside it"
    )
    parser.add_argument("--rounds", type=int, default=30, help=f"per shape, or as many as {SHAPE_SECONDS} s allow")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every loop; one per core by default")
    parser.add_argument("--quick", action="store_true", help="2 rounds of the smallest shape, without torch.compile")
    parser.add_argument("--document", type=Path, help="replace picture and table in this Markdown file")
    parser.add_argument("--table", type=Path, metavar="JSON", help="take this result; measure nothing")
    try:
        run(parser.parse_args())
    except StepcellError as error:
        log(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
