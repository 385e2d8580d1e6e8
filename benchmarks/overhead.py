"""Benchmark of the overhead of StepLoop over the run of its session, in ONNX Runtime on the CPU.

A ConvGRU of the shape below is stepped by `StepLoop.step`, and by `StepLoop.step_slots` with all slots, with one idle
slot and with half of them idle. Each step is compared with a bare `run_with_iobinding` of the same session just before
or after it, on bindings made once (two buffers per state, input and output in place), so that other load on the machine
affects both. Everything runs in one thread, and CPU time is measured, which leaves out the time of other programs.
Interference through shared caches only adds time, so the overhead is the difference of the 20th percentiles; the
quartiles of the differences within the pairs show how quiet the machine was.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell

BATCH, INPUT, HIDDEN, SIZE = 16, 5, 32, 8
WARM_UP = 50
QUIET = 20  # percentile


class BareStep:
    """The same session with bindings of its own, run without anything else."""

    def __init__(self, loop: StepLoop, x: NDArray[np.float32]) -> None:
        self._session = loop._backend._session  # type: ignore[attr-defined]
        # kept alive: a binding has only their addresses
        self._x, self._y = x, np.zeros((BATCH, HIDDEN, SIZE, SIZE), np.float32)
        self._states = [np.zeros_like(self._y) for _ in range(2)]
        self._bindings = [self._bind(now) for now in range(2)]
        self._now = 0

    def _bind(self, now: int) -> Any:
        binding = self._session.io_binding()
        for name, array in (("x", self._x), ("state_in.h", self._states[now])):
            binding.bind_cpu_input(name, array)
        for name, array in (("y", self._y), ("state_out.h", self._states[1 - now])):
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        return binding

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._bindings[self._now])
        self._now ^= 1


def seconds(call: Callable[[], object]) -> float:
    """CPU time of a call in this thread."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def paired(loop: StepLoop, x: NDArray[np.float32], call: Callable[[], object], steps: int) -> dict[str, float]:
    """Times of the call and of the bare run of the same session, alternating which one is first."""
    call()
    bare = BareStep(loop, x)
    pairs = []
    for turn in range(steps + WARM_UP):
        if turn % 2:
            mine, its = seconds(call), seconds(bare)
        else:
            its, mine = seconds(bare), seconds(call)
        pairs.append((its, mine))
    return summary(np.array(pairs[WARM_UP:]) * 1e6)


def measure(steps: int) -> dict[str, object]:
    """Measure all ways to step, each with a session of its own."""
    x = np.random.default_rng(0).random((BATCH, INPUT, SIZE, SIZE), np.float32)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convgru.onnx"
        torch.manual_seed(0)
        export_onnx(CellStack([ConvGRUCell(INPUT, HIDDEN)]), path, precision="float32")
        with StepLoop.open(path, threads=1) as loop:
            clip = itertools.cycle([x.copy() for _ in range(3)])  # every frame is an array of its own
            results["step"] = paired(loop, x, lambda: loop.step(x=next(clip)), steps)
        for name, stride, first in (("all", 1, 0), ("one idle", 1, 1), ("half idle", 2, 0)):
            with StepLoop.open(path, slots=BATCH, threads=1) as loop:
                slots = [loop.attach() for _ in range(BATCH)][first::stride]
                frames = {slot: {"x": x[slot.index : slot.index + 1]} for slot in slots}
                call = functools.partial(loop.step_slots, frames)
                results[f"step_slots, {name}"] = paired(loop, x, call, steps)
    return results


def summary(pairs: NDArray[np.float64]) -> dict[str, float]:
    """Statistics of pairs (bare, loop) in microseconds."""
    bare, loop = np.percentile(pairs, QUIET, axis=0)
    low, middle, high = np.percentile(pairs[:, 1] - pairs[:, 0], [25, 50, 75])
    figures = {
        "bare_us": bare,
        "loop_us": loop,
        "overhead_us": loop - bare,
        "overhead_percent": (loop - bare) / bare * 100,
        "pair_difference_us_p25": low,
        "pair_difference_us_median": middle,
        "pair_difference_us_p75": high,
    }
    return {name: round(float(value), 1) for name, value in figures.items()}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="JSON; stdout by default")
    options = parser.parse_args()
    result = {
        "model": f"ConvGRU float32, batch {BATCH}, {INPUT} -> {HIDDEN} channels, {SIZE}x{SIZE}, 3x3",
        "steps": options.steps,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "results": measure(options.steps),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
