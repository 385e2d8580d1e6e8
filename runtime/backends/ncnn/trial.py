"""A trial of a back end against another: over some steps they must agree, then both are timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from stepcell.dims import resolve
from stepcell.runtime.backends.base import Backend
from stepcell.runtime.backends.settle import settle
from stepcell.sample_frames import random_frame

__all__ = ["STEPS", "TOLERANCE", "difference", "speedup"]

STEPS = 4  # that are compared, with states fed back
TOLERANCE = 1e-4  # largest difference, relative to the largest value of the tensor in that step
_SETTLE = 0.03  # seconds at most before a back end is timed
_ROUND_SECONDS = 0.02  # of steps of one back end

Arrays = Mapping[str, NDArray[np.generic]]


def difference(reference: Backend, candidate: Backend, symbols: Mapping[str, int]) -> float:
    """The largest difference of outputs and states over some steps, relative to the largest value of the tensor.

    Both are configured, and start from the initial states. Frames are random; integers may differ by one level.
    """
    rng, worst = np.random.default_rng(0), 0.0
    for backend in (reference, candidate):
        backend.reset()
    for _ in range(STEPS):
        frame = _frame(reference, symbols, rng)
        expected, found = ({**backend.step(frame), **backend.read_state()} for backend in (reference, candidate))
        worst = max(worst, *(_relative(expected[name], found[name]) for name in expected))
    return worst


def speedup(reference: Backend, candidate: Backend, symbols: Mapping[str, int], seconds: float) -> float:
    """How many times as fast the candidate is: the median over rounds in which both make some steps.

    Args:
        seconds: after which no round starts, though one is made.
    """
    frame = _frame(reference, symbols, np.random.default_rng(1))
    deadline, order = time.perf_counter() + seconds, random.Random(0)
    ratios: list[float] = []
    steps = max(1, round(_ROUND_SECONDS / _seconds(reference, frame, 1)))
    while not ratios or time.perf_counter() < deadline:
        taken = {}
        for backend in order.sample([reference, candidate], 2):
            settle(_SETTLE)
            if steps > 1:
                backend.step(frame)  # the first is cold
            taken[id(backend)] = _seconds(backend, frame, steps)
        ratios.append(taken[id(reference)] / taken[id(candidate)])
    return statistics.median(ratios)


def _seconds(backend: Backend, frame: Arrays, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        backend.step(frame)
    return time.perf_counter() - started


def _frame(backend: Backend, symbols: Mapping[str, int], rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    return {spec.name: random_frame(spec, resolve(spec.shape, symbols), rng) for spec in backend.contract.inputs}


def _relative(expected: NDArray[np.generic], found: NDArray[np.generic]) -> float:
    """The largest difference, relative to the largest value; infinite where one of both is not finite."""
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    worst = np.abs(wide - other).max(initial=0.0)
    if expected.dtype.kind != "f":
        worst = max(worst - 1, 0.0)
    return float(worst / max(np.abs(wide).max(initial=0.0), 1e-6)) if np.isfinite(worst) else np.inf
