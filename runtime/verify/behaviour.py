"""Tests of state handling: liveness, pairing, isolation of rows, reset and resume."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.runtime.loop.slots import is_shared
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.measure import difference, max_abs, rms, wide
from stepcell.runtime.verify.results import Verdict, judged, unchecked
from stepcell.runtime.verify.stepper import Arrays, Stepper

__all__ = ["isolation", "liveness", "pairing", "reset", "resume"]

_STEPS = 4  # in which a change of a state must show, and a spoiled row another
_PERTURBED = 0.25  # of a state's own spread
_HUGE = 60000.0  # a value that float16 still holds
_MOST_PAIRS = 24

States = Mapping[str, NDArray[Any]]
Tensors = dict[tuple[str, str], NDArray[Any]]  # by kind ("output", "state") and name


def liveness(subject: Stepper, clip: Clip, states: States, *, start: int = 0, seed: int = 0) -> Verdict:
    """Whether every state, changed a little along real states, changes an output or another state.

    A state that acts through a warp or a product with another may be dead at the zero state, so real ones are used:
    warm ones, and those after two steps, since a counter of frames may act early only. The number is the smallest
    effect over the change that caused it.
    """
    rng = np.random.default_rng(seed)
    effects: dict[str, float] = {}
    for places, begin in ((states, start), (_early(subject, clip), 2)):
        base = _play(subject, clip, places, begin)
        for spec in subject.contract.states:
            if not spec.dtype.startswith("float"):
                continue
            value = wide(places[spec.name])
            # the signs are random and the sizes are not: an average over the elements cannot come out as zero
            spread = float(value.std()) or max_abs(value) or 1.0
            change = _PERTURBED * spread * rng.choice([-1.0, 1.0], value.shape)
            changed = _play(subject, clip, {**places, spec.name: value + change}, begin)
            apart = [
                rms(difference(new[key], old[key]))
                for new, old in zip(changed, base, strict=True)
                for key in old
                if key != ("state", spec.name)
            ]
            effects[spec.name] = max(effects.get(spec.name, 0.0), max(apart, default=0.0) / rms(change))
    if not effects:
        return unchecked("liveness", "the model has no state of floats")
    weakest = min(effects, key=lambda name: effects[name])
    dead = [name for name, effect in effects.items() if not effect > 0]
    if dead:
        says = (
            f"{', '.join(dead)}: a perturbation changes nothing else within {_STEPS} steps: not fed back, or not used"
        )
    else:
        says = f"every state matters; the smallest effect: {effects[weakest]:.2g} of a perturbation of {weakest}"
    return judged("liveness", effects[weakest], float(np.nextafter(0, 1)), says, dead or [weakest], at_least=True)


def pairing(subject: Stepper, exact: Stepper, clip: Clip, states: States, *, start: int = 0) -> Verdict:
    """Whether any two states of equal shape are told apart, and none stands where another belongs.

    The number is the smallest ratio of the error with two states swapped to the error as they are.
    """
    groups: dict[Any, list[str]] = {}
    for spec in subject.contract.states:
        groups.setdefault((np.shape(states[spec.name]), spec.dtype), []).append(spec.name)
    pairs = [
        (a, b)
        for group in groups.values()
        for a, b in itertools.combinations(group, 2)
        if rms(difference(states[a], states[b])) > 0
    ]
    if not pairs:
        return unchecked("pairing", "no two states have the same shape")
    frame = clip[start]
    truth, own = _all(exact.step(frame, states)), _all(subject.step(frame, states))
    as_they_are = _distance(own, truth)
    found: list[tuple[float, str, str, str]] = []
    for a, b in pairs[:_MOST_PAIRS]:
        taken = _all(subject.step(frame, {**states, a: states[b], b: states[a]}))
        if _distance(taken, own) == 0:
            return Verdict(
                name="pairing",
                passed=False,
                value=1.0,
                limit=1.0,
                at_least=True,
                says=f"{a} and {b} can be swapped without any effect: neither is used",
                subjects=(a, b),
            )
        forms = {"inputs": taken, "outputs": _crossed(own, a, b), "inputs and outputs": _crossed(taken, a, b)}
        for form, tensors in forms.items():
            ratio = _distance(tensors, truth) / as_they_are if as_they_are else np.inf
            found.append((float(ratio), a, b, form))
    ratio, a, b, form = min(found)
    if ratio < 1:
        says = f"{a} and {b} are swapped as {form}: exchanged, the error is {ratio:.1e} times as large"
    else:
        count = f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of equal shape"
        says = f"{count}, all distinct: swapping two makes the error at least {ratio:.1e} times as large"
    return judged("pairing", min(ratio, 1e300), 1.0, says, [a, b], at_least=True)


def isolation(subject: Stepper, clip: Clip) -> Verdict:
    """Whether NaN and huge values in one row of the batch leave every other row as it is, bit by bit.

    Args:
        clip: with at least two rows.
    """
    axes = _row_axes(subject.contract, clip)
    if axes is None:
        return unchecked("isolation", "the batch is one row")
    rows = _rows(axes, clip)
    spoiled = rows // 2
    expected = list(_free_run(subject, clip, _STEPS))
    for what, value in (("NaN", np.nan), ("a huge value", _HUGE)):
        frames = [
            {
                name: _spoiled(array, axes[name], spoiled, value) if name in axes else array
                for name, array in clip[t].items()
            }
            for t in range(_STEPS)
        ]
        for t, got in enumerate(_free_run(subject, Clip(frames, clip.name), _STEPS)):
            for (_, name), row, *_ in _different_rows(got, expected[t], axes, set(range(rows)) - {spoiled}):
                says = f"{what} in row {spoiled} changes row {row} of {name} at step {t + 1}"
                return judged("isolation", 1.0, 0.0, says, [name])
    says = f"NaN and huge values in one of {rows} rows leave the other rows bit-identical"
    return judged("isolation", 0.0, 0.0, says)


def reset(subject: Stepper, clip: Clip) -> Verdict:
    """Whether a reset, of the run or of one row, equals a fresh start, bit by bit, and other rows do not notice."""
    fresh = list(_free_run(subject, clip, _STEPS))
    run = subject.run()
    for t in range(_STEPS):
        run.step(clip[_STEPS + t])
    run.reset()
    for t, truth in enumerate(fresh):
        again = _all(run.step(clip[t]))
        for (kind, name), array in truth.items():
            if not np.array_equal(again[kind, name], array, equal_nan=True):
                off = rms(difference(again[kind, name], array))
                says = f"after a reset {name} differs from a fresh start by {off:.1e} (rms) at step {t + 1}"
                return judged("reset", off, 0.0, says, [name])
    axes = _row_axes(subject.contract, clip)
    if axes is None or not subject.contract.states:
        return judged("reset", 0.0, 0.0, "after a reset the run is bit-identical to a fresh one")
    last, rows = clip[_STEPS], _rows(axes, clip)
    run = subject.run()
    for t in range(_STEPS):
        run.step(clip[t])
    run.reset([row == rows - 1 for row in range(rows)])
    cleared = _all(run.step(last))
    *_, kept = _free_run(subject, clip, _STEPS + 1)
    begun = _all(subject.run().step(last))
    for truth, which, what in ((begun, {rows - 1}, "does not start afresh"), (kept, set(range(rows - 1)), "changes")):
        for (_, name), row, off in _different_rows(cleared, truth, axes, which):
            says = f"after a reset of row {rows - 1} alone, row {row} of {name} {what}"
            return judged("reset", off, 0.0, says, [name])
    return judged(
        "reset", 0.0, 0.0, f"after a reset, of the run or of one of {rows} rows, it is bit-identical to a fresh start"
    )


def resume(subject: Stepper, clip: Clip, *, steps: int) -> Verdict:
    """Whether a run that is resumed from its states before every step is the uninterrupted run, bit by bit."""
    whole = [{key: _digest(array) for key, array in tensors.items()} for tensors in _free_run(subject, clip, steps)]
    outcome = subject.run().step(clip[0])
    for t in range(1, steps):
        states = outcome[1]
        outcome = subject.step(clip[t], states)
        for (kind, name), array in _all(outcome).items():
            if _digest(array) != whole[t][kind, name]:
                says = (
                    f"{name} at step {t + 1} differs between the run and one resumed from its states: the step depends "
                    "on more than its inputs and states"
                )
                return judged("resume", float(t + 1), 0.0, says, [name])
    says = f"resumed from its states before each of {steps} steps, the run is bit-identical"
    return judged("resume", 0.0, 0.0, says)


def _early(subject: Stepper, clip: Clip) -> Arrays:
    """The subject's own states after two steps."""
    run = subject.run()
    for t in range(2):
        _, states = run.step(clip[t])
    return states


def _play(subject: Stepper, clip: Clip, states: States, start: int) -> list[Tensors]:
    """Outputs of some steps, and all states after the last."""
    played: list[Tensors] = []
    now: Arrays = dict(states)
    for t in range(start, start + _STEPS):
        outputs, now = subject.step(clip[t], now)
        played.append({("output", name): array for name, array in outputs.items()})
    played.append({("state", name): array for name, array in now.items()})
    return played


def _free_run(subject: Stepper, clip: Clip, steps: int) -> Iterator[Tensors]:
    run = subject.run()
    for t in range(steps):
        with np.errstate(all="ignore"):  # where it is NumPy that computes a spoiled row
            results = run.step(clip[t])
        yield _all(results)


def _all(results: tuple[Arrays, Arrays]) -> Tensors:
    outputs, states = results
    return {
        **{("output", name): array for name, array in outputs.items()},
        **{("state", name): array for name, array in states.items()},
    }


def _crossed(tensors: Tensors, a: str, b: str) -> Tensors:
    return {**tensors, ("state", a): tensors["state", b], ("state", b): tensors["state", a]}


def _distance(a: Tensors, b: Tensors) -> float:
    """Sum over the tensors of the rms difference over the rms value."""
    return sum(rms(difference(a[key], b[key])) / (rms(b[key]) or 1.0) for key in b)


def _digest(array: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()


def _row_axes(contract: StepContract, clip: Clip) -> dict[str, int] | None:
    """By tensor name the axis that counts rows; None where there is one row."""
    found: dict[str, int] = {state.name: state.batch_axis for state in contract.states if state.batch_axis is not None}
    own = [spec for spec in (*contract.inputs, *contract.outputs) if spec.shape and not is_shared(spec)]
    if len(found) < len(contract.states) or any(spec.batch_axis is None for spec in own):
        return None
    batch = {state.streams for state in contract.states}
    for spec in own:
        axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and dim in batch]
        axes = [spec.batch_axis] if isinstance(spec.batch_axis, int) else axes
        found[spec.name] = axes[0] if axes else 0
    return found if contract.inputs and contract.states and _rows(found, clip) >= 2 else None


def _rows(axes: Mapping[str, int], clip: Clip) -> int:
    return min(shape[axes[name]] for name, shape in clip.shapes.items() if name in axes)


def _different_rows(
    got: Tensors, truth: Tensors, axes: Mapping[str, int], rows: set[int]
) -> Iterator[tuple[tuple[str, str], int, float]]:
    """Tensor, row and rms difference of every row that is not the same."""
    for key, array in got.items():
        for row in sorted(rows):
            a, b = (np.take(each, row, axes[key[1]]) for each in (array, truth[key]))
            if not np.array_equal(a, b, equal_nan=True):
                yield key, row, rms(difference(a, b))


def _spoiled(array: NDArray[Any], axis: int, row: int, value: float) -> NDArray[Any]:
    changed = array.copy()
    index: list[Any] = [slice(None)] * array.ndim
    index[axis] = row
    if array.dtype.kind == "f":
        changed[tuple(index)] = value
    elif array.dtype == np.uint8:  # there is no NaN: every pixel another
        changed[tuple(index)] = 255 - array[tuple(index)]
    return changed
