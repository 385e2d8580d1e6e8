"""The verification of one model: runs both sides and asks every question that can be asked of them."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepcell.contract import StateSpec, StepContract
from stepcell.errors import InputError
from stepcell.runtime.engine.layers import EngineLayer
from stepcell.runtime.verify.audit import precision_verdict
from stepcell.runtime.verify.behaviour import isolation, liveness, pairing, reset, resume
from stepcell.runtime.verify.bound import Bound, Forgetting, bound_verdict, derive_bound, forgetting
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.growth import error_growth, growth_verdict
from stepcell.runtime.verify.identity import identity
from stepcell.runtime.verify.measure import difference, rms
from stepcell.runtime.verify.prediction import WINDOW, prediction_verdict, warm_errors
from stepcell.runtime.verify.results import Growth, Verdict, WarmError, judged, unchecked
from stepcell.runtime.verify.stepper import Arrays, Stepper
from stepcell.runtime.verify.storage import Storage, as_stored, storage_verdict, warm_up

__all__ = [
    "Findings",
    "Reference",
    "VerifyOptions",
    "now",
    "own_verdicts",
    "require_same_interface",
    "verify",
    "with_rows",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """References that the subject is compared with.

    Attributes:
        exact: computes in float64, from the exact weights.
        peer: trusted and of the subject's precision; shows what that precision costs. None: there is none, or it is
            the subject itself.
        rounded: computes in float64 from weights rounded as the file has them; the file in float64 must equal it.
    """

    exact: Stepper
    peer: Stepper | None = None
    rounded: Stepper | None = None

    @property
    def differentiable(self) -> bool:
        """Whether `exact` knows its Jacobian."""
        return bool(getattr(self.exact, "differentiable", False))


@dataclass(frozen=True)
class VerifyOptions:
    """Numbers of steps, limits and tolerance of a verification.

    Attributes:
        steps: steps of the free run from the initial states.
        still: maximum number of warm-up steps of the reference, with the last frame held.
        warm_seconds: maximum duration of these warm-up steps, in seconds.
        window: steps from warm states.
        lyapunov: Jacobians for the bound.
        resumed: steps of the run that is interrupted at each of them.
        rows: batch rows for the isolation check, if the model does not fix their number.
        tolerance: largest absolute difference of an output; None: derived.
    """

    steps: int = 100
    still: int = 4096
    warm_seconds: float = 60.0
    window: int = WINDOW
    lyapunov: int = 48
    resumed: int = 64
    rows: int = 3
    tolerance: float | None = None


@dataclass
class Findings:
    """Results of a verification; become a `Report`.

    Attributes:
        warm, moving: errors from warm states on, with the last frame held and along the clip.
        states: states of the reference, warm.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    growth: tuple[Growth, ...] = ()
    warm: tuple[WarmError, ...] = ()
    moving: tuple[WarmError, ...] = ()
    storage: tuple[Storage, ...] = ()
    forgetting: Forgetting | None = None
    bound: Bound | None = None
    warm_up: int = 0
    states: Arrays = field(default_factory=dict)
    seconds: float = 0.0


def verify(
    subject: Stepper,
    reference: Reference,
    clip: Clip,
    options: VerifyOptions | None = None,
    *,
    in_float64: Stepper | None = None,
    layers: Sequence[EngineLayer] = (),
) -> Findings:
    """Run every check.

    Args:
        subject: what is verified.
        clip: one row, or as many as the model is fixed at; where the batch is free, rows are added by themselves.
        layers: layers of the engine that the subject runs.
        in_float64: the subject's own graph in float64, to be compared with `reference.rounded`.

    Raises:
        InputError: the two sides do not have the same inputs, outputs and states.
    """
    options, started = options or VerifyOptions(), time.perf_counter()
    require_same_interface(subject.contract, reference.exact.contract)
    found, verdicts = Findings(), []
    exact = reference.exact

    logger.debug("free run of %d steps", options.steps)
    found.growth = error_growth(subject, exact, clip, options.steps, reference.peer)
    logger.debug("warming up the reference")
    live = min(options.steps, max(len(clip), options.window))
    run = exact.run()
    for t in range(2):
        _, early = run.step(clip[t])
    stored = as_stored(subject, clip, early)
    warm = warm_up(exact, stored, clip, live=live, still=options.still, seconds=options.warm_seconds)
    found.states, found.warm_up, found.storage = warm.states, warm.steps, warm.storage
    still = Clip([clip[live - 1]], clip.name)
    logger.debug("warm window")
    # with the frame held, where storage loses most: a moving scene shakes a stalled state loose
    found.warm, _ = warm_errors(subject, exact, still, warm.losing, options.window)
    found.moving, _ = warm_errors(subject, exact, clip, found.states, options.window)
    sizes = {name: int(np.size(array)) for name, array in found.states.items()}

    if reference.differentiable:
        logger.debug("largest Lyapunov factor over %d steps", options.lyapunov)
        moving = {each.name: each.one_step for each in found.moving}
        one_step = {each.name: (*each.one_step, *moving[each.name]) for each in found.warm}
        rounded = {name for name, errors in one_step.items() if any(errors)}
        found.forgetting = forgetting(exact, clip, found.states, options.lyapunov, rounded=rounded)  # type: ignore[arg-type]
        outputs, errors = _output_errors(subject, exact, clip, found.states, options.window)
        found.bound = derive_bound(found.forgetting, one_step, {**sizes, **outputs}, errors)

    verdicts.append(_identity(in_float64, reference, clip, found.states))
    verdicts.append(
        growth_verdict(
            found.growth,
            subject,
            peer=None if reference.peer is None else reference.peer.name,
            bound=None if found.bound is None else found.bound.rms,
            tolerance=options.tolerance,
        )
    )
    verdicts.append(_worse(prediction_verdict(found.warm, sizes), prediction_verdict(found.moving, sizes)))
    verdicts.append(storage_verdict(found.storage))
    if found.forgetting is None:
        verdicts.append(unchecked("bound", "the reference has no Jacobian here"))
    else:
        verdicts.append(bound_verdict(found.forgetting, found.bound, found.growth))
    verdicts += own_verdicts(subject, exact, clip, found.states, stored, options, layers)
    found.verdicts, found.seconds = verdicts, time.perf_counter() - started
    return found


def own_verdicts(
    subject: Stepper,
    reference: Stepper,
    clip: Clip,
    states: Arrays,
    stored: Sequence[StateSpec],
    options: VerifyOptions,
    layers: Sequence[EngineLayer],
) -> list[Verdict]:
    """Verdicts that need only the subject and single steps of the reference, live or recorded.

    Args:
        states: warm states of the reference.
        stored: the subject's states as it computes them.
    """
    rows = with_rows(subject.contract, clip, options.rows)
    return [
        precision(subject.contract, stored, layers),
        liveness(subject, clip, states),
        pairing(subject, reference, clip, states),
        isolation(subject, rows),
        reset(subject, rows),
        resume(subject, clip, steps=max(2, min(options.resumed, options.steps))),
    ]


def precision(contract: StepContract, stored: Sequence[StateSpec], layers: Sequence[EngineLayer]) -> Verdict:
    """Whether the states are computed as wide as the contract stores them, and an engine's layers as it says."""
    cells = [cell for cell in contract.cells if cell.op is not None]
    narrow = [state.name for state, found in zip(contract.states, stored, strict=True) if state.dtype != found.dtype]
    if narrow and cells and len(cells) == len(contract.cells):  # whose gates are float32 by definition
        names, dtype = ", ".join(narrow), next(s.dtype for s in contract.states if s.name == narrow[0])
        says = (
            f"{names}: stored in {dtype}, and all values that come back are float16's: the update is computed narrower"
        )
        return judged("precision", float(len(narrow)), 0.0, says, narrow)
    if layers:
        return precision_verdict(layers, contract)
    if narrow:
        return judged(
            "precision", 0.0, 0.0, f"{', '.join(narrow)}: computed in float16 by the module's own code", narrow
        )
    widths = ", ".join(sorted({state.dtype for state in contract.states})) or "no state"
    return judged("precision", 0.0, 0.0, f"states come back as wide as they are stored ({widths})")


def require_same_interface(subject: StepContract, reference: StepContract) -> None:
    """Raise InputError where names of inputs, outputs or states differ."""
    for what in ("inputs", "outputs", "states"):
        got, expected = ([spec.name for spec in getattr(each, what)] for each in (subject, reference))
        if sorted(got) != sorted(expected):
            raise InputError(f"{what}: the reference has {', '.join(expected) or 'none'}, the model {', '.join(got)}")


def now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat()


def _identity(in_float64: Stepper | None, reference: Reference, clip: Clip, states: Arrays) -> Verdict:
    if in_float64 is None or reference.rounded is None:
        return unchecked("identity", "needs the ONNX file and its source (--against)")
    return identity(in_float64, reference.rounded, clip, states)


def _output_errors(
    subject: Stepper, exact: Stepper, clip: Clip, states: Arrays, steps: int
) -> tuple[dict[str, int], dict[str, float]]:
    """Sizes, and the largest rms error of a single step from true states, of every output."""
    sizes: dict[str, int] = {}
    errors: dict[str, float] = {}
    now = states
    for t in range(steps):
        truth, after = exact.step(clip[t], now)
        got, _ = subject.step(clip[t], now)
        for name, array in truth.items():
            sizes[name] = int(np.size(array))
            errors[name] = max(errors.get(name, 0.0), rms(difference(got[name], array)))
        now = after
    return sizes, errors


def _worse(a: Verdict, b: Verdict) -> Verdict:
    return a if (a.value or 0.0) >= (b.value or 0.0) else b


def with_rows(contract: StepContract, clip: Clip, rows: int) -> Clip:
    """The clip with so many rows, where the batch is free."""
    batch = {state.streams for state in contract.states}
    free = bool(batch) and all(isinstance(dim, str) for dim in batch)
    return clip.rows(contract, rows) if free and rows > 1 else clip
