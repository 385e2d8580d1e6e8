"""Error growth: both sides run freely over the same frames, each feeding back its own states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from stepcell.errors import InputError
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.measure import compared_steps, deviation, max_abs
from stepcell.runtime.verify.results import Growth, Verdict, judged
from stepcell.runtime.verify.stepper import Arrays, Stepper

__all__ = ["AMPLIFIED", "ROUNDINGS", "SHARE", "error_growth", "growth_verdict"]

SHARE = {"float16": 0.02, "float32": 1e-3}  # of labels and bytes: the last bit of a float decides between two of them
AMPLIFIED = 4.0  # two runs of the same precision round in different places, and the model amplifies both
ROUNDINGS = 4.0  # last bits of the largest value that any implementation may be off by


def error_growth(
    subject: Stepper,
    exact: Stepper,
    clip: Clip,
    steps: int,
    peer: Stepper | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> tuple[Growth, ...]:
    """Run the sides in lockstep from the initial states and compare at steps 1, 2, 4, ..., N.

    Args:
        peer: trusted implementation in the subject's precision; it shows what that precision costs.
        tick: called after every step with its number.

    Raises:
        InputError: the reference returns NaN, which is no difference where both sides return it.
    """
    compared = compared_steps(steps)
    runs = [side.run() for side in (exact, subject, peer) if side is not None]
    kinds = {spec.name: "output" for spec in subject.contract.outputs}
    kinds |= {state.name: "state" for state in subject.contract.states}
    scales = dict.fromkeys(kinds, 0.0)
    errors: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    for t in range(steps):
        results = [_together(run.step(clip[t])) for run in runs]
        truth, got = results[0], results[1]
        for name, kind in kinds.items():
            if truth[name].dtype.kind == "f" and np.isnan(truth[name]).any():
                raise InputError(
                    f"{clip.name}: step {t + 1}: the reference returns NaN in {kind} {name}: nothing can be compared",
                    hint="frames outside the range that the model was trained on, or a state that grows without bound?",
                )
            scales[name] = max(scales[name], max_abs(truth[name]))
        if t + 1 in compared:
            for name in kinds:
                largest, error = deviation(got[name], truth[name])
                of_peer = deviation(results[2][name], truth[name])[1] if peer is not None else math.nan
                errors[name].append((largest, error, of_peer))
        tick(t + 1)
    return tuple(
        Growth(
            name=name,
            kind=kind,
            scale=scales[name],
            steps=tuple(compared),
            max_abs=tuple(found[0] for found in errors[name]),
            rms=tuple(found[1] for found in errors[name]),
            peer_rms=() if peer is None else tuple(found[2] for found in errors[name]),
            is_share=truth[name].dtype.kind != "f",
        )
        for name, kind in kinds.items()
    )


def growth_verdict(
    growth: Sequence[Growth],
    subject: Stepper,
    *,
    peer: str | None,
    bound: dict[str, float] | None = None,
    tolerance: float | None = None,
) -> Verdict:
    """Whether the error stays within its limit. The value is the worst error divided by its limit.

    The limit is, by what is known: the user's tolerance for outputs (largest absolute difference); `AMPLIFIED` times
    what the peer was off by until then; the bound for runs of any length; where none is smaller, the tensor's own
    scale, beyond which nothing of the signal is left. Of integers and booleans a share of the elements may differ: the
    tolerance, or `SHARE` and `AMPLIFIED` times that of the peer.

    Args:
        peer: its name, where the growth has its figures and it is not the subject itself.
        bound: rms for each output and state, from `stepcell.runtime.verify.bound`.
    """
    kinds: dict[str, str] = {spec.name: spec.dtype for spec in subject.contract.outputs}
    kinds |= {state.name: state.dtype for state in subject.contract.states}
    worst, at, name_of_worst = -1.0, 0, ""
    for each in growth:
        kind = kinds[each.name]
        share = SHARE[subject.contract.precision]
        last_bit = float(np.finfo(kind).eps) * max(each.scale, 1e-30) if kind.startswith("float") else 0.5
        allowed = 0.0
        for place, step in enumerate(each.steps):
            if tolerance is not None:
                if each.kind != "output":
                    continue
                ratio = (each.rms if each.is_share else each.max_abs)[place] / tolerance
            elif each.is_share:
                allowed = max(allowed, each.peer_rms[place] if peer is not None else 0.0)
                ratio = each.rms[place] / max(AMPLIFIED * allowed, share)
            else:
                if peer is not None:
                    allowed = max(allowed, each.peer_rms[place])
                    limit = max(AMPLIFIED * allowed, ROUNDINGS * last_bit)
                else:
                    derived = (bound or {}).get(each.name, math.inf)
                    limit = max(derived, ROUNDINGS * last_bit) if derived < each.scale else max(each.scale, last_bit)
                ratio = each.rms[place] / limit
            if not ratio <= worst:
                worst, at, name_of_worst = ratio, step, each.name
    if worst < 0:
        return judged("growth", 0.0, 1.0, "there is nothing to compare")
    found = next(each for each in growth if each.name == name_of_worst)
    place = found.steps.index(at)
    if found.is_share:
        against = f"{tolerance:.1e} asked for" if tolerance is not None else "what rounding may decide"
        error = f"{found.rms[place]:.2%} of the elements differ"
    elif tolerance is not None:
        against = f"{tolerance:.1e} asked for"
        error = f"largest difference {found.max_abs[place]:.1e}"
    else:
        against = (
            f"{AMPLIFIED:g} times the error of {peer}"
            if peer is not None
            else "the bound for runs of any length"
            if (bound or {}).get(found.name, math.inf) < found.scale
            else "the size of the signal"
        )
        error = f"rms error {found.rms[place]:.1e} of a signal up to {found.scale:.2g}"
    relation = "within" if worst <= 1 else "beyond"
    return judged(
        "growth", worst, 1.0, f"{found.name} at step {at}: {error}, {worst:.2g} of the limit: {relation} {against}",
        [found.name],
    )  # fmt: skip


def _together(results: tuple[Arrays, Arrays]) -> Arrays:
    outputs, states = results
    return {**outputs, **states}
