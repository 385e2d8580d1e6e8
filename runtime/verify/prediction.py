"""Prediction of the error of a free run from the errors of its single steps.

In a window of warm states, the reference run is perturbed by each step's own error:

    g(t+1) = R(g(t)) + eps(t),   eps(t) = S(h(t)) - R(h(t))

with h the reference run, R its step in float64 and S the step of the subject. To first order g - h follows
e'(t+1) = J(t) e'(t) + eps(t) with J the Jacobian of R; running R itself costs less than J and has no second-order
error. If rounding is the only cause of errors, the subject's free run follows g. If the subject stalls or is biased,
its errors depend on its own states, and it does not: the difference, divided by the measured error, is the defect.

Rounding alone causes a defect too, since it is different at different states. It is measured: eps is computed a second
time at the mirror image h - (s - h) of the subject's state s, and the reference is perturbed by that.

For a state that is stored in float16, eps contains the rounding of R(h), not that of R(rounded h), which would include
the lost updates that this test looks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.verify.measure import difference, rms, wide
from stepcell.runtime.verify.results import Verdict, WarmError, judged, unchecked
from stepcell.runtime.verify.stepper import Arrays, Frames, Stepper, rounded

__all__ = ["WINDOW", "prediction_verdict", "warm_errors"]

WINDOW = 16  # compared steps
_LEAST = 0.05  # smaller defects pass
_SPREAD = 1.5  # of the noise, for a state of many elements
_FEW = 64  # elements, below which the noise of one step says little: that of the whole window is taken
_HARMLESS = 0.05  # of the path of the state, as in `stepcell.runtime.verify.storage`


def warm_errors(
    subject: Stepper,
    exact: Stepper,
    clip: Frames,
    states: Mapping[str, NDArray[Any]],
    steps: int = WINDOW,
    *,
    start: int = 0,
    tick: Callable[[int], None] = lambda _: None,
) -> tuple[tuple[WarmError, ...], Arrays]:
    """Measured and predicted errors from warm states.

    Args:
        states: states of the reference, warm.
        start: number of the clip's frame to begin with.

    Returns:
        One result per state, and the subject's states after the window.
    """
    specs = [state for state in subject.contract.states if state.dtype.startswith("float")]
    names = [state.name for state in specs]
    true: Arrays = {name: np.asarray(array) for name, array in states.items()}
    own: Arrays = rounded(subject.contract.states, true)
    first = _widened(own, names)
    predicted, mirrored = {**true, **first}, {**true, **first}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    path = dict.fromkeys(names, 0.0)
    for t in range(start, start + steps):
        frame = clip[t]
        next_true = exact.step(frame, true)[1]
        eps = _one_step(subject, exact, frame, true, next_true)
        mirror = {**true, **{name: 2 * wide(true[name]) - wide(own[name]) for name in names}}
        eps_mirror = _one_step(subject, exact, frame, mirror, exact.step(frame, mirror)[1])
        predicted = _disturbed(exact.step(frame, predicted)[1], eps)
        mirrored = _disturbed(exact.step(frame, mirrored)[1], eps_mirror)
        own = subject.step(frame, own)[1]
        for name in names:
            path[name] += rms(difference(next_true[name], true[name]))
        true = next_true
        for name in names:
            measured = difference(own[name], true[name])
            forecast = difference(predicted[name], true[name])
            missed = difference(own[name], predicted[name])
            noise = difference(mirrored[name], predicted[name])
            found[name].append((rms(measured), rms(forecast), rms(missed), rms(noise), rms(eps[name]), path[name]))
        tick(t - start + 1)
    return tuple(
        WarmError(
            name=name,
            measured=tuple(row[0] for row in found[name]),
            predicted=tuple(row[1] for row in found[name]),
            missed=tuple(row[2] for row in found[name]),
            noise=tuple(row[3] for row in found[name]),
            one_step=tuple(row[4] for row in found[name]),
            path=tuple(row[5] for row in found[name]),
        )
        for name in names
    ), own


def prediction_verdict(warm: Sequence[WarmError], sizes: Mapping[str, int]) -> Verdict:
    """Whether one-step errors predict the free run. The value is the worst defect divided by its limit.

    The limit is the largest of: 5 %; the defect that rounding explains (`noise`) times 1.5, more for states of few
    elements, whose noise is that of the whole window; 5 % of the path of the state, because rounding with a constant
    sign in a long sum is not a stall.

    Args:
        sizes: elements of each state.
    """
    if not warm:
        return unchecked("prediction", "the model has no state of floats")
    worst, worst_ratio, at = warm[0], -1.0, 0
    for each in warm:
        spread = _SPREAD + 8 / math.sqrt(max(1, sizes[each.name]))
        typical = math.sqrt(sum(noise * noise for noise in each.noise) / len(each.noise))
        rows = zip(each.measured, each.missed, each.noise, each.path, strict=True)
        for t, (measured, missed, noise, path) in enumerate(rows):
            if not measured:
                continue
            noise = max(noise, typical) if sizes[each.name] < _FEW else noise
            limit = max(_LEAST, spread * noise / measured, _HARMLESS * path / measured)
            ratio = math.inf if not math.isfinite(missed) else missed / measured / limit
            if not ratio <= worst_ratio:
                worst, worst_ratio, at = each, ratio, t
    if worst_ratio < 0:
        return judged("prediction", 0.0, 1.0, "no state differs from the reference in the warm window")
    last = len(worst.measured) - 1
    defect = worst.missed[at] / worst.measured[at]
    explained = worst.noise[at] / worst.measured[at]
    end = worst.predicted[last] / worst.measured[last] if worst.measured[last] else 1.0
    if worst_ratio <= 1:
        says = (
            f"{worst.name}: after {last + 1} warm steps the errors of single steps add up to {end:.2f} times the "
            f"measured error; at step {at + 1} the two differ most, by {defect:.2f} times the error, and rounding "
            f"explains {explained:.2f}"
        )
    else:
        says = (
            f"{worst.name} stalls or is biased: at step {at + 1} of the warm window the errors of single steps miss "
            f"{defect:.2f} times the measured error, and rounding explains {explained:.2f}"
        )
    return judged("prediction", worst_ratio, 1.0, says, [worst.name])


def _one_step(
    subject: Stepper, exact: Stepper, frame: Mapping[str, NDArray[Any]], states: Arrays, after: Arrays
) -> Arrays:
    """Error of one step from `states`, whose true successor is `after`; see the module."""
    stored = rounded(subject.contract.states, states)
    got = subject.step(frame, stored)[1]
    same = all(np.array_equal(wide(stored[name]), wide(states[name]), equal_nan=True) for name in stored)
    from_stored = after if same else exact.step(frame, stored)[1]
    kept = rounded(subject.contract.states, from_stored)
    ideal = rounded(subject.contract.states, after)
    return {
        name: difference(got[name], kept[name]) + difference(ideal[name], after[name])
        for name in got
        if got[name].dtype.kind == "f"
    }


def _disturbed(states: Arrays, eps: Arrays) -> Arrays:
    return {name: wide(array) + eps[name] if name in eps else array for name, array in states.items()}


def _widened(states: Arrays, names: Sequence[str]) -> Arrays:
    return {name: wide(states[name]) for name in names}
