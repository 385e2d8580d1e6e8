"""Liveness of states: whether the value of a state ever matters, judged along real runs.

A state may be without effect at the first step, where the other states are zero (a last frame that only moves
remembered features), in one clip (a flag that says "start" at every step), or where a change is small (a threshold).
So states are changed in several ways, along runs of several clips, and one effect is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from stepcell.contract import StateSpec
from stepcell.exporter.parity import Array, Arrays, CheckClip, Step

__all__ = ["dead_states"]

_STEPS = 32  # of a clip
_LARGE = 4.0  # times the largest value of a state


def dead_states(step: Step, clips: Sequence[CheckClip], states: Sequence[StateSpec]) -> list[StateSpec]:
    """The states whose value changes no output and no state at any step of any clip.

    Args:
        step: pure; states are changed before a step, and its results compared with those of the run.
        clips: the more they differ, the better; those after the first are run only while a state seems dead.
    """
    dead = {state.name: state for state in states}
    rng = np.random.default_rng(1)
    for clip in clips:
        values = dict(clip.states)
        for data in islice(clip, _STEPS):
            if not dead:
                return []
            base = step(data, values)
            for name in list(dead):
                if any(
                    _differ(base, step(data, {**values, name: other})) for other in _others(values, name, clip, rng)
                ):
                    del dead[name]
            values = {name: base[name] for name in values}
    return list(dead.values())


def _others(values: Arrays, name: str, clip: CheckClip, rng: np.random.Generator) -> Iterator[Array]:
    """Other values of a state: a little off, far off, and its initial value."""
    value = values[name]
    if value.dtype == bool:
        yield ~value
        return
    if value.dtype.kind != "f":
        yield np.asarray(value + rng.integers(1, 3, value.shape)).astype(value.dtype)
        yield clip.states[name]
        return
    largest = float(np.abs(value[np.isfinite(value)]).max(initial=0.0))
    for size in (0.5, _LARGE * max(1.0, largest)):
        yield np.asarray(value + rng.uniform(-size, size, value.shape)).astype(value.dtype)
    yield clip.states[name]


def _differ(one: Arrays, other: Arrays) -> bool:
    return any(not np.array_equal(one[key], other[key], equal_nan=True) for key in one)
