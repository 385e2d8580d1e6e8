"""What rounding costs a file: the error of a free run, and a bound of it that is derived and not chosen.

The file runs beside its reference, each feeding back its own states, over a few clips. Some of its steps are also taken
from the states of the reference; the errors of these single steps and the Jacobian of the graph bound the error of a
run of any length, as in `stepcell.runtime.verify.bound`. A free run beyond its bound stalls or is biased, unless its
single steps predict it, which happens where states jump. Where perturbations grow from step to step no bound exists,
and the contract says so.

An error beyond `TOLERANCE` may be rounding, which the model amplifies, or a mistake. Then the graph is computed in
float64, where only a mistake is left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stepcell.contract import Parity, Spec, StepContract
from stepcell.errors import EvaluationError, ParityError
from stepcell.exporter.arithmetic import IN_ONNX_RUNTIME, EvaluatedFile, holds_float16
from stepcell.exporter.differences import Difference, difference
from stepcell.exporter.parity import TOLERANCE, Array, Arrays, CheckClip, Step, differs
from stepcell.runtime.verify.bound import Bound, Forgetting, derive_bound, forgetting
from stepcell.runtime.verify.growth import AMPLIFIED, ROUNDINGS
from stepcell.runtime.verify.measure import difference as error_of
from stepcell.runtime.verify.measure import max_abs, rms, wide
from stepcell.runtime.verify.prediction import prediction_verdict, warm_errors
from stepcell.runtime.verify.results import WarmError
from stepcell.runtime.verify.stepper import FunctionStepper, rounded

__all__ = ["CheckedFile", "ClipErrors", "check_rounding", "compare", "limit_of", "narrowed"]

logger = logging.getLogger(__name__)

# Largest error of a single step that needs no rounding of activations to explain it, relative to max(1, largest value):
# constants of the module's own code are rounded in the file.
_IN_FLOAT64 = {"float32": 1e-5, "float16": 2e-2}
_EVERY = 4  # of so many steps one is also taken from the reference's states
_JACOBIANS = 24  # at the end of the first clip, where its states are warmest
_DIRECTIONS = 1  # a random perturbation has a part along every direction


@dataclass(frozen=True)
class CheckedFile:
    """A file under comparison.

    Attributes:
        data: the serialised model, with the names of the contract.
        step: the file, computed in the `arithmetic` that the contract records.
        source: makes the step that the file was made from, in float64 from the weights as the file has them.
    """

    data: bytes
    step: Step
    arithmetic: str
    contract: StepContract
    source: Callable[[], Step]


@dataclass
class _Beyond:
    """The first error beyond the tolerance, with what its step was computed from."""

    t: int
    name: str
    found: Difference
    data: Arrays
    states: Arrays


@dataclass
class ClipErrors:
    """Errors over one clip, by output and state.

    Attributes:
        max_abs: largest absolute error of the free run.
        differing: of integers and booleans, the largest share that differs in the free run.
        free: of floats, rms error of the free run, by step.
        single: of floats, rms error of single steps, by sampled step.
        sizes, scales: of floats, the elements and the largest absolute value.
        warm: states of the reference before the last `_JACOBIANS` steps.
        is_wide: whether the reference computes in float64.
    """

    clip: CheckClip
    max_abs: dict[str, float] = field(default_factory=dict)
    differing: dict[str, float] = field(default_factory=dict)
    free: dict[str, list[float]] = field(default_factory=dict)
    single: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    beyond: _Beyond | None = None
    warm: Arrays = field(default_factory=dict)
    is_wide: bool = False

    @property
    def start(self) -> int:
        """The step that `warm` is before."""
        return max(0, self.clip.steps - _JACOBIANS)


def limit_of(contract: StepContract) -> float:
    """The entry of `TOLERANCE` for a contract; a single float16 state selects that of float16."""
    return TOLERANCE["float16" if holds_float16(contract) else contract.precision]


def narrowed(step: Step, contract: StepContract) -> Step:
    """A step that takes states of any float type and rounds them to those of the contract."""
    return lambda data, states: step(data, rounded(contract.states, states))


def check_rounding(
    reference: Step,
    file: CheckedFile,
    clips: Sequence[CheckClip],
    *,
    subject: str,
    hint: str | None = None,
    tolerance: float | None = None,
) -> Parity:
    """Compare a file with its reference over clips, and derive the bound of its error.

    Args:
        reference: in float64; the original file, in its own arithmetic, for a fused one.
        clips: the bound is derived along the first one.
        subject: what messages call the reference.
        hint: hint in the error.
        tolerance: what a file that is no exact copy may be off by, relative to max(1, largest value); None: derived.

    Returns:
        The largest errors and the bound, per output and state.

    Raises:
        ParityError: the file computes something else, returns Inf or NaN, or is beyond what its single steps explain;
            or its error is beyond `TOLERANCE` and its graph cannot be evaluated.
        ExportError: the reference returns NaN.
    """
    runs = compare(reference, file, clips, subject=subject, hint=hint, tolerance=tolerance)
    found = _forgetting(file, runs[0])
    bounds = [_bound(found, run, file.contract) for run in runs]
    held = [_holds(bound, run, reference, file, subject, hint) for bound, run in zip(bounds, runs, strict=True)]
    floats = list(runs[0].free)
    return Parity(
        steps=max(clip.steps for clip in clips),
        reference=subject,
        arithmetic=file.arithmetic,
        max_abs_error={name: max(run.max_abs[name] for run in runs) for name in runs[0].max_abs},
        rms_error={name: max(max(run.free[name]) for run in runs) for name in floats},
        differing={name: max(run.differing[name] for run in runs) for name in runs[0].differing},
        rho=found.rho if found is not None and math.isfinite(found.rho) else None,
        memory=found.memory if found is not None and found.forgets else None,
        bound=_largest([bound.rms for bound in bounds if bound is not None], floats) if all(held) else None,
    )


def compare(
    reference: Step,
    file: CheckedFile,
    clips: Sequence[CheckClip],
    *,
    subject: str,
    hint: str | None = None,
    tolerance: float | None = None,
) -> list[ClipErrors]:
    """The errors over each clip, without a bound; arguments and errors as for `check_rounding`."""
    limit = tolerance or limit_of(file.contract)
    runs = [_run(reference, file, clip, limit, subject, hint) for clip in clips]
    for run in runs:
        if run.beyond is not None and (tolerance or not _is_rounding(run.beyond, file, subject)):
            each = run.beyond
            raise differs(each.name, subject, each.found, each.t, run.clip, hint)
    return runs


def _run(
    reference: Step, file: CheckedFile, clip: CheckClip, tolerance: float, subject: str, hint: str | None
) -> ClipErrors:
    run, contract = ClipErrors(clip), file.contract
    from_any = narrowed(file.step, contract)
    true, own = clip.states, clip.states
    for t, data in enumerate(clip):
        truth, got = reference(data, true), file.step(data, own)
        sampled = t % _EVERY == 0 or t == clip.steps - 1
        single = from_any(data, true) if sampled and t else got
        if t == run.start:
            run.warm = true
        for name, expected in truth.items():
            found = difference(name, expected, got[name], tolerance, subject, t)
            alone = difference(name, expected, single[name], tolerance, subject, t) if sampled else found
            if not math.isfinite(max(found.largest, alone.largest)):
                raise ParityError(f"{name}: holds Inf or NaN at step {t} of {clip.steps} ({clip.name})", hint=hint)
            _note(run, name, expected, found, got[name], single[name] if sampled else None)
            worse = max(found, alone, key=lambda each: each.error)
            if worse.is_beyond and run.beyond is None:
                run.beyond = _Beyond(t, name, worse, data, true)
        true = {name: truth[name] for name in true}
        own = {name: got[name] for name in own}
        run.is_wide |= any(array.dtype == np.float64 for array in true.values())
    return run


def _note(run: ClipErrors, name: str, truth: Array, found: Difference, free: Array, single: Array | None) -> None:
    run.max_abs[name] = max(run.max_abs.get(name, 0.0), found.largest)
    if found.differing is not None:
        run.differing[name] = max(run.differing.get(name, 0.0), found.differing)
        return
    run.free.setdefault(name, []).append(rms(error_of(free, truth)))
    if single is not None:
        run.single.setdefault(name, []).append(rms(error_of(single, truth)))
    values = wide(truth)
    run.scales[name] = max(run.scales.get(name, 0.0), max_abs(values[np.isfinite(values)]))
    run.sizes[name] = int(np.size(truth))


def _is_rounding(found: _Beyond, file: CheckedFile, subject: str) -> bool:
    """Whether rounding alone explains an error: the graph is right, and is computed as it is written."""
    contract = file.contract
    kind = "float16" if holds_float16(contract) else "float32"

    def differences(truth: Arrays, step: Step, tolerance: float) -> dict[str, Difference]:
        """By name, of a step from the reference's states."""
        got = step(found.data, found.states)
        return {name: difference(name, each, got[name], tolerance, subject, found.t) for name, each in truth.items()}

    try:
        in_float64 = EvaluatedFile(file.data, "float64", contract).step
        source = file.source()(found.data, found.states)
        written = narrowed(EvaluatedFile(file.data, "as_written", contract).step, contract)
        # weights that were combined are rounded in the file: that counts no more than the rounding within its step
        own = differences(in_float64(found.data, found.states), written, 0.0)
        exact = differences(source, in_float64, _IN_FLOAT64[kind])
        if any(each.is_beyond and not each.error <= own[name].error for name, each in exact.items()):
            return False
        if file.arithmetic != IN_ONNX_RUNTIME:
            return True
        peer = differences(source, written, 0.0)
    except EvaluationError:
        return False
    single = differences(source, narrowed(file.step, contract), _IN_FLOAT64[kind])
    return all(each.error <= max(each.limit, AMPLIFIED * peer[name].error) for name, each in single.items())


def _forgetting(file: CheckedFile, run: ClipErrors) -> Forgetting | None:
    """None without a state of floats, and with a warning where the evaluator cannot compute the graph's Jacobian."""
    steps = run.clip.steps - run.start
    if not any(state.dtype.startswith("float") for state in file.contract.states):
        return None
    try:
        graph = EvaluatedFile(file.data, "float64", file.contract)
        own = {name for name, errors in run.single.items() if any(errors)}
        return forgetting(graph, list(run.clip), run.warm, steps, start=run.start, directions=_DIRECTIONS, rounded=own)
    except EvaluationError as error:
        logger.warning(f"{error.message}; no error bound is derived")
        return None


def _floats(contract: StepContract) -> dict[str, str]:
    """Dtypes of the outputs and states of floats."""
    specs: list[Spec] = [*contract.outputs, *contract.states]
    return {spec.name: spec.dtype for spec in specs if spec.dtype.startswith("float")}


def _bound(found: Forgetting | None, run: ClipErrors, contract: StepContract) -> Bound | None:
    if found is None:
        return None
    floats = _floats(contract)
    states = {state.name: run.single[state.name] for state in contract.states if state.name in floats}
    outputs = {spec.name: max(run.single[spec.name]) for spec in contract.outputs if spec.name in floats}
    return derive_bound(found, states, run.sizes, outputs)


def _holds(
    bound: Bound | None, run: ClipErrors, reference: Step, file: CheckedFile, subject: str, hint: str | None
) -> bool:
    """Whether a run is within its bound; if not, its error must be the one that its single steps predict.

    Raises:
        ParityError: it is not.
    """
    if bound is None:
        return True
    dtypes = _floats(file.contract)
    beyond = [
        name
        for name, limit in bound.rms.items()
        if not max(run.free[name]) <= max(limit, ROUNDINGS * float(np.finfo(dtypes[name]).eps) * run.scales[name])
    ]
    if not beyond:
        return True
    verdict = prediction_verdict(_predicted(reference, file, run), run.sizes)
    if verdict.passed:
        return False
    raise ParityError(
        f"{beyond[0]}: is off from {subject} by {max(run.free[beyond[0]]):.3g} (rms) within {run.clip.steps} steps "
        f"({run.clip.name}), and the errors of its single steps add up to {bound.rms[beyond[0]]:.3g} at most; "
        f"{verdict.says}",
        hint=hint,
    )


def _predicted(reference: Step, file: CheckedFile, run: ClipErrors) -> tuple[WarmError, ...]:
    contract = file.contract

    def stepper(step: Step, *, wide: bool) -> FunctionStepper:
        def both(data: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
            results = step(data, states)
            new = {state.name: results[state.name] for state in contract.states}
            return {spec.name: results[spec.name] for spec in contract.outputs}, new

        return FunctionStepper(both, contract, "", wide=wide)

    exact = stepper(reference, wide=run.is_wide)
    return warm_errors(stepper(file.step, wide=False), exact, list(run.clip), run.clip.states, run.clip.steps)[0]


def _largest(bounds: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float] | None:
    if not bounds:
        return None
    return {name: max(bound[name] for bound in bounds) for name in names if name in bounds[0]}
