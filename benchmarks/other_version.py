"""StepLoop of another version of stepcell, in a process of its own that benchmarks/loop.py times in the same rounds.

    pip install --no-deps --target build/other FOLDER_OR_WHEEL
    python benchmarks/loop.py --other build/other

The process times its steps itself, with the clock and the frames of the other loops, so that no frame is sent.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OtherVersion", "random_frames"]


class OtherVersion:
    """A loop whose steps run in the other process.

    Args:
        installed: folder that holds the package `stepcell`.
        model: the exported file.
        shapes: of the inputs of a step.
        threads: for one step.
    """

    def __init__(self, installed: Path, model: Path, shapes: tuple[tuple[int, ...], ...], threads: int) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__, str(model), json.dumps(shapes), str(threads)],
            env=os.environ | {"PYTHONPATH": str(installed.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def error(self, expected: NDArray[Any]) -> float:
        """Largest difference of the first output from these, from the initial state; NaN if an output is NaN."""
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file, expected)
            file.flush()
            return self._ask(f"error {len(expected)} {file.name}")

    def milliseconds(self, steps: int, warm_up: int) -> float:
        """Time per step."""
        return self._ask(f"time {steps} {warm_up}")

    def close(self) -> None:
        """End the process."""
        self._child.communicate()

    def _ask(self, line: str) -> float:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of the other version ended with {self._child.wait()}")
        return float(answer)


def random_frames(count: int, shapes: Any, seed: int) -> list[tuple[Any, ...]]:
    """Inputs of `count` steps, uniform in [0, 1), float32."""
    generator = np.random.default_rng(seed)
    return [tuple(generator.random(shape, np.float32) for shape in shapes) for _ in range(count)]


def _serve(model: str, shapes: Any, threads: int) -> None:
    from stepcell.runtime import StepLoop

    loop = StepLoop.open(model, threads=threads)
    names = [spec.name for spec in loop.contract.inputs]
    output = loop.contract.outputs[0].name
    clip = itertools.cycle([dict(zip(names, frame, strict=True)) for frame in random_frames(4, shapes, 1)])
    for line in sys.stdin:
        verb, steps, rest = line.split(maxsplit=2)
        if verb == "error":
            frames = random_frames(int(steps), shapes, 0)
            found = [loop.step(**dict(zip(names, frame, strict=True)))[output] for frame in frames]
            answer = float(np.abs(np.stack(found) - np.load(rest.strip())).max())
        else:
            for _ in range(int(rest)):
                loop.step(**next(clip))
            started = time.perf_counter()
            for _ in range(int(steps)):
                loop.step(**next(clip))
            answer = (time.perf_counter() - started) / int(steps) * 1e3
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
