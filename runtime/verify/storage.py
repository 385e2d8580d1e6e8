"""Storage of states: how much of the movement of a state is lost because it is rounded after every step.

Only the reference runs, in float64. An update smaller than half an ulp of the stored value leaves the stored value as
it is. One such step does no harm, but a state whose updates are always that small stops moving. The loss of an element
is therefore the absolute value of the sum of its lost updates, divided by the length of its path: close to zero for a
state at rest after a fast rise, one half for a state that froze halfway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StateSpec
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.measure import wide
from stepcell.runtime.verify.results import Verdict, judged, unchecked
from stepcell.runtime.verify.stepper import Arrays, Stepper

__all__ = ["LOSS", "SHARE", "Storage", "StorageTrace", "WarmUp", "as_stored", "storage_verdict", "warm_up"]

LOSS = 0.05  # of the path of an element; float16 loses this much with a memory of about 200 frames
SHARE = 0.01  # of a state's elements may lose more
_STILL = 64  # steps between two looks at whether the state still moves
_CHANGED = 0.1  # of a state, to see whether it is stored wide
_LEAST_PATH = 8.0  # ulps; elements with a shorter path are not counted


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """What the storage of one state loses.

    Attributes:
        name, dtype: the state, and how it is stored.
        lost_updates: share of the true one-step updates that leave the stored value as it is, over all elements and
            the last half of the run.
        lost_movement: the sum of the lost updates over the sum of all, by absolute value and over the whole run.
        losing: share of the moving elements that lose more than `LOSS` of their path.
        worst: largest loss of an element, as a part of its path.
        frozen_at: median absolute value of the losing elements at the end; None: there are none.
    """

    name: str
    dtype: str
    lost_updates: float
    lost_movement: float
    losing: float
    worst: float
    frozen_at: float | None = None


class StorageTrace:
    """Accumulates lost updates along a run of the reference.

    Args:
        states: with the dtypes that the subject stores them in.
    """

    def __init__(self, states: Sequence[StateSpec]) -> None:
        self._states = [state for state in states if state.dtype.startswith("float")]
        self._path: dict[str, NDArray[np.float64]] = {}
        self._lost: dict[str, NDArray[np.float64]] = {}
        self._peak: dict[str, NDArray[np.float64]] = {}
        self._small: dict[str, float] = {}
        self._counts: dict[str, list[tuple[int, int]]] = {state.name: [] for state in self._states}
        self._last: dict[str, NDArray[np.float64]] = {}

    def add(self, before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> float:
        """One step of the reference, from `before` to `after`.

        Returns:
            Mean of the lost updates in ulps over the elements of a state; the largest over all states.
        """
        worst = 0.0
        for state in self._states:
            old, new, name = wide(before[state.name]), wide(after[state.name]), state.name
            if name not in self._path:
                self._path[name], self._lost[name], self._peak[name] = (np.zeros(old.shape) for _ in range(3))
            with np.errstate(over="ignore", invalid="ignore"):
                stored = old.astype(state.dtype)
                update = new - old
                lost = ((wide(stored) + update).astype(state.dtype) == stored) & (update != 0)
            self._path[name] += np.abs(update)
            self._lost[name] += np.where(lost, update, 0.0)
            self._small[name] = self._small.get(name, 0.0) + float(np.abs(update)[lost].sum())
            last_bit = np.spacing(np.abs(stored)).astype(np.float64)
            worst = max(worst, float(np.mean(np.where(lost, np.abs(update) / last_bit, 0.0))) if lost.any() else 0.0)
            np.maximum(self._peak[name], np.abs(new), out=self._peak[name])
            self._counts[name].append((int(lost.sum()), int((update != 0).sum())))
            self._last[name] = new
        return worst

    def result(self) -> tuple[Storage, ...]:
        """Per state, in the order of the contract."""
        found = []
        for state in self._states:
            if state.name not in self._path:
                continue
            path, lost = self._path[state.name], np.abs(self._lost[state.name])
            last_bit = np.finfo(state.dtype).eps * np.maximum(self._peak[state.name], np.finfo(state.dtype).tiny)
            moving = path > _LEAST_PATH * last_bit
            loss = np.divide(lost, path, out=np.zeros_like(path), where=moving)
            losing = moving & (loss > LOSS)
            counts = self._counts[state.name]
            late = counts[len(counts) // 2 :]
            updates = sum(total for _, total in late)
            found.append(
                Storage(
                    name=state.name,
                    dtype=state.dtype,
                    lost_updates=sum(part for part, _ in late) / updates if updates else 0.0,
                    lost_movement=self._small[state.name] / float(path.sum()) if path.any() else 0.0,
                    losing=float(losing.sum() / moving.sum()) if moving.any() else 0.0,
                    worst=float(loss.max(initial=0.0)),
                    frozen_at=float(np.median(np.abs(self._last[state.name])[losing])) if losing.any() else None,
                )
            )
        return tuple(found)


@dataclass(frozen=True)
class WarmUp:
    """The reference, warm.

    Attributes:
        states: after the last step.
        losing: before the step that loses most with the frame held; equal to `states` if no step loses anything.
        steps: how many it took.
        storage: what it would have lost on the way, by state.
    """

    states: Arrays
    losing: Arrays
    steps: int
    storage: tuple[Storage, ...]


def warm_up(
    exact: Stepper,
    states: Sequence[StateSpec],
    clip: Clip,
    *,
    live: int,
    still: int,
    seconds: float = 60.0,
    tick: Callable[[int], None] = lambda _: None,
) -> WarmUp:
    """Run the reference until its states are warm: along the clip, then with the last frame held.

    A static scene is the hardest case for the storage of a state, and the usual one for a fixed camera.

    Args:
        states: as the subject stores them.
        live: steps along the clip.
        still: largest number of steps with the frame held; they end earlier if no state moves by an ulp.
        seconds: time limit of the steps with the frame held.
    """
    run, trace, deadline = exact.run(), StorageTrace(states), time.monotonic() + seconds
    before: Arrays | None = None
    marked: Arrays = {}
    losing: Arrays | None = None
    done, most = 0, 0.0
    for t in range(live + still):
        _, after = run.step(clip[min(t, live - 1)])
        if before is not None:
            loss = trace.add(before, after)
            if loss > most and t >= live:
                most, losing = loss, before
        before, done = after, t + 1
        tick(done)
        if t >= live and (t - live) % _STILL == 0:
            if marked and not _moves(states, marked, after):
                break
            marked = {name: array.copy() for name, array in after.items()}
        if time.monotonic() > deadline and done >= live:
            break
    assert before is not None
    return WarmUp(before, losing if losing is not None else before, done, trace.result())


def _moves(states: Sequence[StateSpec], before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> bool:
    """Whether an element moved by more than an ulp."""
    for state in states:
        if state.dtype.startswith("float"):
            old, new = wide(before[state.name]), wide(after[state.name])
            last_bit = np.finfo(state.dtype).eps * np.maximum(np.abs(new), np.finfo(state.dtype).tiny)
            if (np.abs(new - old) > last_bit).any():
                return True
    return False


def as_stored(subject: Stepper, clip: Clip, states: Mapping[str, NDArray[Any]]) -> list[StateSpec]:
    """The states with their effective dtypes: float16 if all returned values are float16 values.

    A state that is declared float32 but computed in float16 is as narrow as one stored in float16. The step starts from
    `states` changed by up to a tenth, so that a counter or flag is no whole number by itself; one that comes back whole
    all the same says nothing about its width.
    """
    run, rng = subject.run(), np.random.default_rng(0)
    run.load(
        {
            name: (array * rng.uniform(1, 1 + _CHANGED, array.shape)).astype(array.dtype)
            if array.dtype.kind == "f"
            else array
            for name, array in states.items()
        }
    )
    _, new = run.step(clip[0])
    found = []
    for state in subject.contract.states:
        values = new[state.name]
        narrow = (
            state.dtype in ("float32", "float64")
            and values.dtype.kind == "f"
            and bool((values != np.rint(values)).any())
        )
        if narrow:
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = bool(np.array_equal(values.astype(np.float16).astype(values.dtype), values, equal_nan=True))
        found.append(msgspec.structs.replace(state, dtype="float16") if narrow else state)
    return found


def storage_verdict(storage: Sequence[Storage]) -> Verdict:
    """Fails where more than `SHARE` of a state's elements lose more than `LOSS` of their path."""
    if not storage:
        return unchecked("storage", "the model has no state of floats")
    worst = max(storage, key=lambda each: (each.losing, each.worst))
    lost = f"{worst.lost_movement:.1%} of the movement of {worst.name} is lost to rounding in {worst.dtype}"
    if worst.losing > SHARE:
        where = "" if worst.frozen_at is None else f" (typically at {worst.frozen_at:.3g})"
        says = (
            f"{worst.name} stalls in {worst.dtype}: {worst.losing:.0%} of its elements lose more than {LOSS:.0%} of "
            f"their movement{where}, the worst {worst.worst:.0%}; {lost}"
        )
    else:
        says = f"{lost}; the worst element loses {worst.worst:.1%} of its movement"
    return judged("storage", worst.losing, SHARE, says, [worst.name])
