"""Error bound for runs of any length, from the contraction rate of the step.

To first order the error of a run obeys e(t+1) = J(t) e(t) + eps(t). If products of k Jacobians along the clip shrink
like C rho^k, no run is ever off by more than C max|eps| / (1 - rho), in the Euclidean norm of all states together.
rho is the largest Lyapunov factor, from power iteration with Jacobian-vector products along the reference run; C is
how far a perturbation rose above that rate on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.verify.measure import norm, wide
from stepcell.runtime.verify.results import Growth, Verdict, unchecked
from stepcell.runtime.verify.stepper import Arrays, Differentiable, Frames

__all__ = ["Bound", "Forgetting", "bound_verdict", "derive_bound", "forgetting", "never_forgets", "remembers"]

_SETTLE = 4  # parts of the iteration: the first one turns the perturbation into the leading direction
_UNMEASURED = 1e-5  # a memory of 10^5 frames cannot be told from an endless one along a clip of some 50
_STAYS = 1e-3  # of growth per step
_HIDES = 8  # times as many elements
_SMALL = 64  # elements: the rest of the states may hide what becomes of a perturbation of so few
_DIRECTIONS = 2  # perturbations to start with


class Forgetting(msgspec.Struct, frozen=True, kw_only=True):
    """Growth of perturbations of the states along the clip.

    Attributes:
        rho: largest Lyapunov factor per step.
        transient: C, at least 1: growth above that rate.
        gains: by output of floats, the largest change of it over the change of the states.
        steps: Jacobians that went into it.
        exact: states that are never rounded, such as counters, and that no error of another state reaches.
    """

    rho: float
    transient: float
    gains: dict[str, float]
    steps: int
    exact: tuple[str, ...] = ()

    @property
    def memory(self) -> float:
        """Frames after which a perturbation is at 1/e; infinite where it never is."""
        return 1 / (1 - self.rho) if self.forgets else math.inf

    @property
    def forgets(self) -> bool:
        """Whether rho is below 1, by more than the measurement error."""
        return self.rho < 1 - _UNMEASURED


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """Bound of the rms error of every state and output, for a run of any length.

    Attributes:
        forgetting: where it comes from.
        one_step: largest Euclidean norm of a one-step error that was seen.
        rms: by name of output or state.
    """

    forgetting: Forgetting
    one_step: float
    rms: dict[str, float]


def forgetting(
    reference: Differentiable,
    frames: Frames,
    states: Mapping[str, NDArray[Any]],
    steps: int,
    *,
    start: int = 0,
    directions: int = _DIRECTIONS,
    rounded: Container[str] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Forgetting:
    """Power iteration along `steps` steps.

    Args:
        reference: in float64.
        states: of the reference before step `start`; warm.
        directions: random perturbations to start with; one more of the small states where there are large ones beside
            them, whose perturbations would hide what becomes of it.
        rounded: the states that single steps round; a perturbation starts in no other. None, or none of them: all.
    """
    rng = np.random.default_rng(0)
    floats = [state.name for state in reference.contract.states if state.dtype.startswith("float")]
    names = [name for name in floats if rounded is None or name in rounded] or floats
    now: Arrays = {name: np.asarray(array) for name, array in states.items()}
    zero = {name: np.zeros(now[name].shape) for name in floats}
    reached = set(names)

    def unit(of: Sequence[str]) -> Arrays:
        return _unit({name: rng.standard_normal(now[name].shape) for name in of})

    hidden = max(now[name].size for name in names) // _HIDES if names else 0
    small = [name for name in names if now[name].size < min(_SMALL, hidden + 1)]
    starts = [names] * directions + ([small] if small else [])
    tangents = [unit(each) for each in starts]
    logs: list[list[float]] = [[0.0] for _ in tangents]
    gains = dict.fromkeys((spec.name for spec in reference.contract.outputs if spec.dtype.startswith("float")), 0.0)
    for t in range(start, start + steps):
        after = now
        for index, tangent in enumerate(tangents):
            _, after, along_outputs, along_states = reference.jvp(frames[t], now, {**zero, **tangent})
            for name in gains:
                if name in along_outputs:
                    gains[name] = max(gains[name], norm({name: along_outputs[name]}))
            reached.update(name for name in floats if np.any(along_states[name]))
            length = norm({name: along_states[name] for name in floats})
            if not 0 < length < math.inf:  # nothing is remembered along this direction, or the run overflowed
                logs[index].append(-math.inf if length == 0 else math.inf)
                tangents[index] = unit(starts[index])
                continue
            logs[index].append(logs[index][-1] + math.log(length))
            tangents[index] = {name: along_states[name] / length for name in floats}
        now = after
        tick(t - start + 1)
    exact = tuple(name for name in floats if name not in reached)
    curves = [np.array(log) for log in logs]
    if any(np.isposinf(curve).any() or np.isnan(curve).any() for curve in curves):
        return Forgetting(rho=math.inf, transient=math.inf, gains=gains, steps=steps, exact=exact)
    finite = [curve for curve in curves if np.isfinite(curve).all()]
    if not finite:
        return Forgetting(rho=0.0, transient=1.0, gains=gains, steps=steps, exact=exact)
    first = steps // _SETTLE
    rate = max((curve[-1] - curve[first]) / max(1, steps - first) for curve in finite)
    drift = [curve - rate * np.arange(len(curve)) for curve in finite]
    rise = max(float((curve - np.minimum.accumulate(curve)).max()) for curve in drift)
    return Forgetting(rho=math.exp(rate), transient=math.exp(max(0.0, rise)), gains=gains, steps=steps, exact=exact)


def derive_bound(
    found: Forgetting,
    one_step: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    output_errors: Mapping[str, float],
) -> Bound | None:
    """The bound of every state and output; None where rho >= 1.

    Args:
        one_step: by state of floats, rms errors of single steps, as many for each.
        sizes: elements of every state and output.
        output_errors: by output, the largest rms error of a single step.
    """
    if not found.forgets or not one_step:
        return None
    squares = [[error**2 * sizes[name] for error in errors] for name, errors in one_step.items()]
    eps = max(math.sqrt(sum(step)) for step in zip(*squares, strict=True))
    total = found.transient * eps / (1 - found.rho)
    rms = {name: 0.0 if name in found.exact else total / math.sqrt(sizes[name]) for name in one_step}
    for name, gain in found.gains.items():
        rms[name] = gain * total / math.sqrt(sizes[name]) + output_errors.get(name, 0.0)
    return Bound(forgetting=found, one_step=eps, rms=rms)


def bound_verdict(found: Forgetting, bound: Bound | None, growth: Sequence[Growth]) -> Verdict:
    """Whether measured errors stay below the bound; without a bound, or with none below a signal, nothing is judged.

    Args:
        growth: the free run, by output and state.
    """
    if not found.forgets:
        return Verdict(
            name="bound",
            passed=None,
            value=found.rho,
            limit=1.0,
            says="no bound exists: " + never_forgets(found.rho),
        )
    memory = remembers(found.rho, found.memory)
    if bound is None:
        return unchecked("bound", f"{memory}; the model has no float states")
    measured = {each.name: max(each.rms) for each in growth}
    scales = {each.name: each.scale for each in growth}
    ratios = {name: measured[name] / limit for name, limit in bound.rms.items() if name in measured and limit > 0}
    if not ratios:
        return Verdict(name="bound", passed=True, value=0.0, limit=1.0, says=f"{memory}; no step has an error")
    loose = {name: limit / scales[name] for name, limit in bound.rms.items() if name in ratios and scales[name]}
    if (loosest := max(loose, key=lambda name: loose[name], default=None)) and loose[loosest] >= 1:
        return Verdict(
            name="bound",
            passed=None,
            value=ratios[loosest],
            limit=1.0,
            says=f"{memory}; that is too long for a bound: the worst case of a run of any length, an rms error of "
            f"{bound.rms[loosest]:.1e}, is larger than {loosest} itself, {scales[loosest]:.2g}; measured "
            f"{measured[loosest]:.1e}",
            subjects=(loosest,),
        )
    worst = max(ratios, key=lambda name: ratios[name])
    return Verdict(
        name="bound",
        passed=bool(ratios[worst] <= 1),
        value=ratios[worst],
        limit=1.0,
        says=f"{memory}; so the rms error of {worst} stays below {bound.rms[worst]:.1e} however long the run is; "
        f"measured {measured[worst]:.1e}",
        subjects=(worst,),
    )


def remembers(rho: float, memory: float) -> str:
    """How long a model remembers, in words."""
    frames = f"{memory:.0f} frame{'s' * (round(memory) != 1)}"
    if not rho:
        return f"the states remember {frames}: what was changed in them is gone at the next step"
    return f"the states remember {frames}: of what was changed in them, {_part(rho)} is left after each step"


def never_forgets(rho: float) -> str:
    """What it means that perturbations of the states do not shrink, in words."""
    if not math.isfinite(rho):
        grow = "the run overflows"
    else:
        grow = f"what was changed in the states {'stays' if rho < 1 + _STAYS else 'grows'}, {rho:.4g} times per step"
    return f"{grow}, so rounding errors are never forgotten, in any precision; reset the states periodically"


def _part(rho: float) -> str:
    return f"{rho:.0%}" if rho < 0.99 else f"{rho:.3%}"


def _unit(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    length = norm(arrays)
    return {name: wide(array) / (length or 1.0) for name, array in arrays.items()}
