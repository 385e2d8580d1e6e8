"""Timing of step loops side by side in one process: rounds in random order, ratios taken within a round.

Other load on the machine affects all contenders of a round alike, so ratios stay valid when times do not.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell import __version__
from stepcell.runtime.backends.settle import settle
from stepcell.runtime.benchmark.copies import Parts
from stepcell.runtime.benchmark.floor import Floor, Machine
from stepcell.runtime.loop.step_loop import StepLoop

__all__ = [
    "BenchReport",
    "Contender",
    "Effort",
    "ModelTimes",
    "Ratio",
    "Times",
    "load_average",
    "measure",
    "versions",
]

_SHORTEST_ROUND = 0.02  # seconds of a contender's turn
_SETTLE = 0.1  # seconds at most to wait until threads of the last turn have stopped spinning
Frame = dict[str, NDArray[Any]]


@dataclass
class Contender:
    """A model that is timed.

    Attributes:
        name: name of the file.
        loop: open, without slots.
        frames: enough for the processor's caches not to hold them all; used in turn.
    """

    name: str
    loop: StepLoop
    frames: Sequence[Frame]


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        warm_up: seconds of steps that are not counted.
        steps: counted steps of each contender at least.
        seconds: and as many more as fit into this time, of each.
        percentiles: in percent.
    """

    warm_up: float = 0.2
    steps: int = 50
    seconds: float = 2.0
    percentiles: tuple[float, ...] = (50, 90, 95, 99)


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as fast as the first model, by rounds: the median and the quartiles."""

    median: float
    quartiles: tuple[float, float]
    rounds: int


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one model with one number of streams.

    Attributes:
        streams: rows of the batch.
        first_ms: time of the very first step, in which buffers are allocated; in no other figure.
        count: steps in the other figures.
        percentiles_ms: by percentage, as text.
        frames_per_second: rate of all streams together.
        ratio: to the first model; None: this is the first one.
        floor: None: not measured.
        parts: consecutive parts of a step on a GPU; None: not measured.
        times_ms: every step, in order.
    """

    streams: int
    first_ms: float
    count: int
    mean_ms: float
    min_ms: float
    max_ms: float
    percentiles_ms: dict[str, float]
    frames_per_second: float
    ratio: Ratio | None = None
    floor: Floor | None = None
    parts: Parts | None = None
    times_ms: tuple[float, ...] = ()


class ModelTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one model.

    Attributes:
        runs: back end, version and device.
        shapes: shapes of its data inputs with one stream.
    """

    name: str
    runs: str
    shapes: dict[str, tuple[int, ...]]
    times: tuple[Times, ...]


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole result of `stepcell bench`.

    Attributes:
        transfers: what a time includes.
        machine: None: not measured.
        load: average load of the machine before and after.
    """

    date: str
    cpu: str
    cores: int
    versions: dict[str, str]
    transfers: str
    models: tuple[ModelTimes, ...]
    machine: Machine | None
    load: tuple[float, float]


def measure(
    contenders: Sequence[Contender], streams: int, effort: Effort, tick: Callable[[], None] = lambda: None
) -> list[Times]:
    """Time them in rounds; the first one is what ratios refer to."""
    firsts, counted, speeds = [], [], []
    for each in contenders:
        firsts.append(_seconds(each, 0))
        started, number = time.perf_counter(), 0
        while time.perf_counter() - started < effort.warm_up or number < 2:
            number += 1
            _seconds(each, number)
        counted.append([_seconds(each, number)])
        speeds.append(min(_seconds(each, number + at) for at in range(3)))
    turns = [max(1, round(_SHORTEST_ROUND / speed)) for speed in speeds]
    rounds: list[list[float]] = [[] for _ in contenders]
    order, deadline = random.Random(0), time.perf_counter() + effort.seconds * len(contenders)
    times: list[list[float]] = [[] for _ in contenders]
    while min(map(len, times)) < effort.steps or time.perf_counter() < deadline:
        for index in order.sample(range(len(contenders)), len(contenders)):
            if len(contenders) > 1:
                settle(_SETTLE)
            taken = [_seconds(contenders[index], at) for at in range(turns[index] + 1)][1:]  # the first is cold
            times[index] += taken
            rounds[index].append(statistics.median(taken))
        tick()
    return [
        _summary(streams, firsts[index], times[index], effort, _ratio(rounds[0], rounds[index]) if index else None)
        for index in range(len(contenders))
    ]


def versions() -> dict[str, str]:
    """Of what takes part."""
    return {"stepcell": __version__, "python": platform.python_version(), "numpy": np.__version__}


def _seconds(contender: Contender, number: int) -> float:
    frame = contender.frames[number % len(contender.frames)]
    started = time.perf_counter()
    contender.loop.step(**frame)
    return time.perf_counter() - started


def _summary(streams: int, first: float, times: Sequence[float], effort: Effort, ratio: Ratio | None) -> Times:
    milliseconds = np.array(times) * 1e3
    return Times(
        streams=streams,
        first_ms=round(first * 1e3, 4),
        count=len(times),
        mean_ms=round(float(milliseconds.mean()), 4),
        min_ms=round(float(milliseconds.min()), 4),
        max_ms=round(float(milliseconds.max()), 4),
        percentiles_ms={f"{q:g}": round(float(np.percentile(milliseconds, q)), 4) for q in effort.percentiles},
        frames_per_second=round(streams * 1e3 / float(np.median(milliseconds)), 2),
        ratio=ratio,
        times_ms=tuple(round(float(each), 4) for each in milliseconds),
    )


def _ratio(baseline: Sequence[float], own: Sequence[float]) -> Ratio:
    ratios = [first / each for first, each in zip(baseline, own, strict=True)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return Ratio(
        median=round(float(middle), 3), quartiles=(round(float(low), 3), round(float(high), 3)), rounds=len(ratios)
    )


def load_average() -> float:
    """Over the last minute; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
