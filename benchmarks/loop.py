"""Benchmark of the step loop on the CPU: StepLoop and the loops that a user would write, in one process.

    pip install openvino==2026.4.1
    pip install --no-deps --target build/d3671d3 FOLDER_OF_COMMIT_d3671d3
    python benchmarks/loop.py --other build/d3671d3 --document docs/performance.md
    python benchmarks/loop.py --table benchmarks/results/loop.json

All loops (benchmarks/loops.py) have the same weights and number of threads, and must agree with float64 over 32 steps
before they are timed. In every round each of them makes a few steps, in random order, so that other load on the machine
affects all of them; ratios are taken within a round. A matrix product with as many operations is timed in the same
rounds and shows the best rate of the processor. The result is a JSON file with all times, and a plot beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from loop_cases import SHAPES, Case, Shape, make_case
from loop_report import as_block, svg, table, with_block
from loops import BASELINE, FLOOR, LOOPS, TOLERANCES, Loop, matrix_product, reference
from numpy.typing import NDArray
from other_version import OtherVersion, random_frames

import stepcell
from stepcell.cli.console import log
from stepcell.errors import InputError, ParityError, StepcellError, UsageError
from stepcell.files import read_bytes, write_atomic

CHECKED, TOLERANCE = 32, 1e-4  # steps compared before the timing, and largest difference to float64
WARM_UP = 1  # steps of each loop at the start of a round that are not timed
ROUND_SECONDS = 0.03  # of timed steps of the baseline
SHAPE_SECONDS = 15  # no further round of a shape starts after this time, which matters on a busy machine
SETTLE_SECONDS = 0.3  # at most

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


class InProcess:
    """A loop of this process; benchmarks/other_version.py has one of another process with the same methods."""

    def __init__(self, loop: Loop, shapes: Shapes) -> None:
        self._loop, self._shapes = loop, shapes
        self._clip = itertools.cycle(random_frames(4, shapes, 1))  # arrays of their own, as from a decoder

    def error(self, expected: NDArray[Any]) -> float:
        """Largest difference of the first output from these, from the initial state; NaN if an output is NaN."""
        frames = random_frames(len(expected), self._shapes, 0)
        return float(np.max([np.abs(self._loop(*x) - y).max() for x, y in zip(frames, expected, strict=True)]))

    def milliseconds(self, steps: int, warm_up: int) -> float:
        """Time per step, after warm-up steps."""
        for _ in range(warm_up):
            self._loop(*next(self._clip))
        started = time.perf_counter()
        for _ in range(steps):
            self._loop(*next(self._clip))
        return (time.perf_counter() - started) / steps * 1e3

    def close(self) -> None:
        """Nothing to do."""


Timed: TypeAlias = InProcess | OtherVersion


def checked_loops(
    case: Case, *, without: Mapping[str, str] = MappingProxyType({}), other: Path | None = None
) -> tuple[dict[str, Timed], dict[str, dict[str, Any]]]:
    """The loops that run on this machine, and for each its largest error or the reason why it does not run.

    Args:
        without: loops to leave out, with the reason.
        other: folder with another version of stepcell.

    Raises:
        ParityError: a loop differs from float64 by more than its tolerance.
    """
    exact = reference(case)
    expected = np.stack([exact(*x) for x in random_frames(CHECKED, case.shapes, 0)])
    loops: dict[str, Timed] = {}
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, Callable[[], Timed]] = {
        name: partial(lambda make: InProcess(make(case), case.shapes), make) for name, make in LOOPS.items()
    }
    if other is not None:
        made[f"StepLoop of {other.name}"] = lambda: OtherVersion(other, case.exported, case.shapes, case.threads)
    for name, make in made.items():
        if name in without:
            found[name] = {"not_run": without[name]}
            continue
        try:
            loop = make()
            error = loop.error(expected)
        except RuntimeError as problem:  # a compiler or a package that is not installed
            found[name] = {"not_run": str(problem).strip().splitlines()[0]}
            continue
        tolerance = TOLERANCES.get(name, TOLERANCE)
        if not error <= tolerance:
            raise ParityError(
                f"{name}: expected outputs within {tolerance:g} of float64 over {CHECKED} steps, got {error:.1e}",
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


def time_rounds(loops: Mapping[str, Timed], rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Steps per round, and for each loop the milliseconds per step in every round."""
    once = min(loops[BASELINE].milliseconds(2, WARM_UP) for _ in range(3))
    steps = max(2, round(ROUND_SECONDS * 1e3 / once))
    times: dict[str, list[float]] = {name: [] for name in loops}
    order, deadline = random.Random(0), time.perf_counter() + SHAPE_SECONDS
    for done in range(rounds):
        if done >= 2 and time.perf_counter() > deadline:
            break
        for name in order.sample(list(loops), len(loops)):
            settle()
            times[name].append(round(loops[name].milliseconds(steps, WARM_UP), 5))
    return steps, times


def measure(
    shapes: Sequence[Shape],
    rounds: int,
    threads: Sequence[int],
    *,
    other: Path | None = None,
    without: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Check and time every loop at every shape with every number of threads."""
    result: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "stepcell": stepcell.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            **_optional_versions("openvino"),
        },
        "load_before": os.getloadavg(),
        "shapes": [],
    }
    once = {} if len(threads) == 1 else {"torch.compile": f"with {max(threads)} threads only"}  # half a minute each
    with tempfile.TemporaryDirectory() as folder:
        for count, shape in itertools.product(threads, shapes):
            torch.set_num_threads(count)
            case = make_case(shape, Path(folder), count)
            left_out = without if count == max(threads) else {**without, **once}
            loops, found = checked_loops(case, without=left_out, other=other)
            loops[FLOOR], found[FLOOR] = InProcess(matrix_product(case), case.shapes), {}
            steps, times = time_rounds(loops, rounds)
            for name in times:
                found[name]["milliseconds"] = times[name]
                loops[name].close()
            result["shapes"].append(
                {
                    "name": shape.name,
                    "model": shape.model,
                    "frame": shape.frame,
                    "threads": count,
                    "rounds": len(times[BASELINE]),
                    "steps_per_round": steps,
                    "loops": found,
                }
            )
            ran = f"{len(times[BASELINE])} rounds of {steps} steps of {len(loops)} loops"
            log(f"{shape.name}, {count} thread{'s' * (count > 1)}: {ran}")
    result["load_after"] = os.getloadavg()
    return result


def _optional_versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


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
        if arguments.rounds < 2 or min(arguments.threads) < 1:
            got = f"--rounds {arguments.rounds} --threads {' '.join(map(str, arguments.threads))}"
            raise UsageError(f"expected at least 2 rounds and 1 thread, got {got}")
        if arguments.other is not None and not (arguments.other / "stepcell").is_dir():
            raise UsageError(f"--other {arguments.other}: expected a folder that holds the package stepcell")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        if arguments.quick:
            quick = {"torch.compile": "left out by --quick"}
            result = measure(SHAPES[:1], 2, arguments.threads, other=arguments.other, without=quick)
        else:
            result = measure(SHAPES, arguments.rounds, arguments.threads, other=arguments.other)
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
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="of every loop; by default one, then two"
    )
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="with the package stepcell of another version")
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
