"""States that matter late, rarely, or by way of another state are alive; those that nothing reads are dead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from stepcell.contract import StateSpec
from stepcell.exporter.liveness import dead_states
from stepcell.exporter.parity import Array, Arrays, CheckClip, Step

STATES = (StateSpec(name="last", shape=(1, 3)), StateSpec(name="memory", shape=(1, 3)))


def clip(steps: int = 32, first: float = 0.0) -> CheckClip:
    def frames() -> Iterator[Arrays]:
        rng = np.random.default_rng(0)
        for _ in range(steps):
            yield {"x": rng.uniform(0, 1, (1, 3)), "first": np.array(first)}

    return CheckClip("random", steps, frames, {state.name: np.zeros((1, 3)) for state in STATES})


def zeros(array: Array) -> Array:
    return np.zeros_like(array)


def warped(data: Arrays, states: Arrays) -> Arrays:
    """The last frame only moves what is remembered, which is zero at the start."""
    memory = states["memory"] * (data["x"] - states["last"]) + data["x"]
    return {"y": memory, "last": data["x"], "memory": memory}


def thresholded(data: Arrays, states: Arrays) -> Arrays:
    """A change of less than 1000 of the last frame shows nowhere."""
    y = np.where(np.abs(states["last"]) > 3, 1.0, 0.0)
    return {"y": y + states["memory"], "last": data["x"], "memory": data["x"]}


def late(data: Arrays, states: Arrays) -> Arrays:
    """A counter opens the gate of the last frame after 20 steps."""
    gate = (states["memory"] > 20).astype(float)
    return {"y": gate * states["last"], "last": data["x"], "memory": np.round(states["memory"]) + 1}


def restarted(data: Arrays, states: Arrays) -> Arrays:
    """A flag forgets everything."""
    kept = {name: array * (1 - data["first"]) for name, array in states.items()}
    return {"y": kept["last"] + kept["memory"], "last": data["x"], "memory": data["x"]}


@pytest.mark.parametrize("step", [warped, thresholded, late, restarted])
def test_alive_along_a_run(step: Step) -> None:
    assert dead_states(step, [clip()], STATES) == []


def test_one_clip_is_enough() -> None:
    assert dead_states(restarted, [clip(first=1.0)], STATES) == list(STATES)
    assert dead_states(restarted, [clip(first=1.0), clip(first=0.0)], STATES) == []


def test_dead_states() -> None:
    def forgetful(data: Arrays, states: Arrays) -> Arrays:
        return {"y": data["x"] + states["memory"], "last": data["x"], "memory": data["x"]}

    def multiplied_by_zero(data: Arrays, states: Arrays) -> Arrays:
        return {"y": data["x"] + zeros(states["last"]), "last": data["x"], "memory": data["x"]}

    assert dead_states(forgetful, [clip()], STATES) == [STATES[0]]
    assert dead_states(multiplied_by_zero, [clip()], STATES) == list(STATES)


def test_a_state_of_flags_or_counts() -> None:
    states = (StateSpec(name="seen", shape=(1,), dtype="bool"), StateSpec(name="count", shape=(1,), dtype="int64"))
    start = {"seen": np.zeros(1, bool), "count": np.zeros(1, np.int64)}

    def step(data: Arrays, now: Arrays) -> Arrays:
        return {
            "y": data["x"] * now["seen"] + (now["count"] > 2),
            "seen": ~zeros(now["seen"]),
            "count": now["count"] + 1,
        }

    run = CheckClip("random", 8, clip().frames, start)
    assert dead_states(step, [run], states) == []
