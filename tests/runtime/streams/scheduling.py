"""Streams through a scheduler, alone and together, and what their steps held."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.report import StreamReport
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.scheduler import Scheduler
from stepcell.runtime.streams.stepper import LoopStepper
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource

__all__ = ["ONE", "Model", "Watched", "alone", "run", "together"]

Model = Callable[..., Path]
ONE = np.ones((3, 4, 4), np.float32)


class Watched:
    """Counts steps and frames, and can delay the steps."""

    def __init__(self, pause: float = 0.0) -> None:
        self.steps: list[int] = []  # frames in each
        self.most = 0  # largest number of queued frames
        self._pause = pause

    def step(self, seconds: float) -> None:
        self.steps.append(0)
        if self._pause:
            time.sleep(self._pause)

    def frame(self, stream: Stream, seconds: float) -> None:
        self.steps[-1] += 1

    def progress(self, run: RunProgress) -> None:
        self.most = max([self.most, *(sum(stream.queued.values()) for stream in run.streams)])


def run(
    loop: StepLoop, streams: Sequence[Stream], watched: Watched | None = None, **options: Any
) -> list[StreamReport]:
    if watched is not None:
        options |= {"times": watched, "progress": watched.progress}
    return Scheduler(LoopStepper(loop), streams, **options).run()


def alone(model: Path, frames: Sequence[Any], path: Path, reset: ResetPolicy | None = None) -> NDArray[Any]:
    """Results of one stream in a loop of its own."""
    with StepLoop.open(model, threads=1) as loop:
        run(loop, [Stream(FrameSource("alone", frames), ArraySink(path), reset=reset)])
    result: NDArray[Any] = np.load(path)
    return result


def together(
    model: Path, streams: Sequence[Stream], watched: Watched | None = None, **options: Any
) -> list[StreamReport]:
    with StepLoop.open(model, slots=len(streams), threads=1) as loop:
        return run(loop, streams, watched, **options)
