"""Equality check of two step models over many steps, each side feeding back its own states.

Used by all three ways in: a lifted module against the user's module, an exported file against its
module, a fused file against the original file. Accumulating errors become visible, because states are
never exchanged between the two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Parity, StateSpec, StepContract, TensorSpec
from stepcell.errors import ExportError, ParityError

__all__ = [
    "OWN_RUNS",
    "TOLERANCE",
    "Array",
    "Arrays",
    "CheckClip",
    "FileRun",
    "Model",
    "Run",
    "Step",
    "check_equal",
    "fed_back",
    "file_step",
    "nudged",
    "random_clip",
    "smooth_clip",
    "tolerance_of",
]

# Largest accepted |error| per step, relative to max(1, largest |value| of that tensor), by
# (precision, state dtype). float32 sums in another order; float16 rounds weights and activations
# to 11 bits; a float16 state is rounded once more at every step. A wrong convention (gate order,
# reset placement) causes an error of 0.1 or more, so it cannot hide below these.
TOLERANCE = {
    ("float64", "float64"): 1e-9,
    ("float32", "float32"): 1e-4,
    ("float32", "float16"): 5e-2,
    ("float16", "float32"): 2e-2,
    ("float16", "float16"): 5e-2,
}
AMPLIFIED = 4.0  # two runs of the same precision round in different places
OWN_RUNS = 3  # runs of the reference: amplification varies from one rounding to the next

Array = NDArray[Any]
Arrays = dict[str, Array]
FileRun = Callable[[Mapping[str, Array]], Arrays]  # inputs of a file -> its outputs, by the names in the file
Step = Callable[[Arrays, Arrays], Arrays]  # data inputs and states -> outputs and new states, by name


@dataclass(frozen=True)
class CheckClip:
    """Data inputs of some steps, the same at every iteration.

    Attributes:
        name: for messages, such as "random frames, sizes {'batch': 1}".
        steps: the number of steps.
        frames: starts an iteration.
        states: values of the states before the first step.
    """

    name: str
    steps: int
    frames: Callable[[], Iterator[Arrays]]
    states: Arrays

    def __iter__(self) -> Iterator[Arrays]:
        return islice(self.frames(), self.steps)


Run = Callable[[Arrays], Arrays]  # the next step of a run: data inputs -> outputs and new states, by name
Model = Callable[[CheckClip], Run]  # starts a run at the first step of a clip


def tolerance_of(precision: str, states: Sequence[StateSpec]) -> float:
    """The entry of `TOLERANCE` for a contract; a single float16 state selects the float16 tolerance."""
    narrow = any(state.dtype == "float16" for state in states)
    return TOLERANCE[precision, "float16" if narrow else "float32"]


def fed_back(step: Step) -> Model:
    """A stateless step as a model that feeds back its states."""

    def start(clip: CheckClip) -> Run:
        states = dict(clip.states)

        def run(data: Arrays) -> Arrays:
            results = step(data, states)
            states.update({name: results[name] for name in states})
            return results

        return run

    return start


def file_step(
    run: FileRun,
    contract: StepContract,
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Step:
    """A loaded file as a step.

    Args:
        run: the file as a function of arrays by name, such as an `OnnxSession`.
        inputs, outputs: by state, the names of its input and output in the file; the contract's by default.
    """
    inputs = inputs or {state.name: state.input for state in contract.states}
    outputs = outputs or {state.name: state.output for state in contract.states}

    def step(data: Arrays, states: Arrays) -> Arrays:
        results = run({**data, **{inputs[name]: array for name, array in states.items()}})
        new = {name: results[target] for name, target in outputs.items()}
        return {**{spec.name: results[spec.name] for spec in contract.outputs}, **new}

    return step


def nudged(model: Model, precision: str, seed: int) -> Model:
    """The same model with its data inputs off by at most their last bit; seed 0: as they are."""
    rng = np.random.default_rng(seed)
    last_bit = float(np.finfo(precision).eps)

    def nudge(array: Array) -> Array:
        if seed == 0 or array.dtype.kind != "f":
            return array
        return np.asarray(array * (1 + last_bit * rng.integers(-1, 2, array.shape)), array.dtype)

    def start(clip: CheckClip) -> Run:
        run = model(clip)
        return lambda data: run({name: nudge(array) for name, array in data.items()})

    return start


def check_equal(
    reference: Model,
    other: Model,
    clips: Sequence[CheckClip],
    tolerance: float,
    *,
    own_runs: Callable[[], Sequence[Model]],
    subject: str,
    hint: str | None = None,
) -> Parity:
    """Run two models over the same clips and compare every output and state at every step.

    A model may amplify rounding, within a step and from step to step. Where the difference is beyond
    the tolerance, the reference is run again in the precision of the other side, with its inputs
    off by their last bit: the difference may then reach `AMPLIFIED` times the largest error of those runs up to that
    step.

    Args:
        reference: the model whose results are taken as correct.
        tolerance: relative to max(1, largest value of the tensor).
        own_runs: runs of the reference in the other's precision, made only where they are needed.
        subject: what messages call the reference, such as "the original file".
        hint: hint in the error.

    Returns:
        Worst absolute difference per output and state; `amplified` if the tolerance was exceeded.

    Raises:
        ParityError: the difference is larger, or a shape differs.
        ExportError: the reference returns NaN.
    """
    worst: dict[str, float] = {}
    amplified = False
    for clip in clips:
        found = _differences(reference, other, clip, tolerance, subject)
        for differences in found:
            worst = {name: max(worst.get(name, 0.0), each.error) for name, each in differences.items()}
        if any(each.is_beyond for differences in found for each in differences.values()):
            amplified = True
            own = [_differences(reference, model, clip, tolerance, subject) for model in own_runs()]
            _require_within(found, own, clip, subject, hint)
    return Parity(steps=max(clip.steps for clip in clips), reference=subject, max_abs_error=worst, amplified=amplified)


def random_clip(
    contract: StepContract, sizes: str, shapes: Mapping[str, Sequence[int]], steps: int, scalars: Arrays | None = None
) -> CheckClip:
    """Independent values over the whole range: the hardest input for a recurrence.

    Args:
        sizes: for messages.
        shapes: shapes of every data input and every state, by name.
        scalars: inputs that keep one value.
    """
    return _clip(f"random frames, {sizes}", _random_frame, contract, shapes, steps, scalars)


def smooth_clip(
    contract: StepContract, sizes: str, shapes: Mapping[str, Sequence[int]], steps: int, scalars: Arrays | None = None
) -> CheckClip:
    """A slowly moving wave: the state converges, so stalls and drift become visible. Arguments as in `random_clip`."""
    return _clip(f"smooth frames, {sizes}", _smooth_frame, contract, shapes, steps, scalars)


def _clip(
    name: str,
    frame: Callable[[TensorSpec, tuple[int, ...], np.random.Generator, int], Array],
    contract: StepContract,
    shapes: Mapping[str, Sequence[int]],
    steps: int,
    scalars: Arrays | None,
) -> CheckClip:
    def frames() -> Iterator[Arrays]:
        rng = np.random.default_rng(0)
        for t in range(steps):
            data = {spec.name: frame(spec, tuple(shapes[spec.name]), rng, t) for spec in contract.inputs}
            yield {**data, **(scalars or {})}

    states = {state.name: state.initial(shapes[state.name]).copy() for state in contract.states}
    return CheckClip(name, steps, frames, states)


def _random_frame(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, _: int) -> Array:
    if not spec.dtype.startswith("float"):
        return rng.integers(0, 2, shape).astype(spec.dtype)
    low, high = spec.range or (-1.0, 1.0)
    return rng.uniform(low, high, shape).astype(spec.dtype)


def _smooth_frame(spec: TensorSpec, shape: tuple[int, ...], _: np.random.Generator, t: int) -> Array:
    if not spec.dtype.startswith("float"):
        return np.zeros(shape, spec.dtype)
    low, high = spec.range or (-1.0, 1.0)
    phase = np.zeros((1,) * len(shape))
    for axis, size in enumerate(shape):
        ramp = np.arange(size) * 0.13 * (axis + 1)
        phase = phase + ramp.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    wave = 0.5 + 0.45 * np.sin(phase + 0.05 * t)
    return (low + (high - low) * wave).astype(spec.dtype)


@dataclass(frozen=True)
class _Difference:
    """Largest absolute error of one tensor at one step, and the tolerance there."""

    error: float
    limit: float

    @property
    def is_beyond(self) -> bool:
        return not self.error <= self.limit


def _differences(
    reference: Model, other: Model, clip: CheckClip, tolerance: float, subject: str
) -> list[dict[str, _Difference]]:
    """Both sides over the same frames; a dict per step."""
    expected_run, run = reference(clip), other(clip)
    steps = []
    for t, data in enumerate(clip):
        expected, got = expected_run(data), run(data)
        steps.append(
            {name: _difference(name, array, got[name], tolerance, subject, t) for name, array in expected.items()}
        )
    return steps


def _difference(name: str, truth: Array, value: Array, tolerance: float, subject: str, t: int) -> _Difference:
    truth, value = truth.astype(np.float64), value.astype(np.float64)
    if np.isnan(truth).any():
        raise ExportError(
            f"{name}: {subject} returns NaN at step {t}, so nothing can be compared",
            hint="weights with NaN or Inf, or a state that grows without bound?",
        )
    if truth.shape != value.shape:
        raise ParityError(f"{name}: has shape {truth.shape} in {subject} and {value.shape} in its replacement")
    error = float(np.where(truth == value, 0.0, np.abs(value - truth)).max(initial=0.0))
    size = float(np.abs(truth[np.isfinite(truth)]).max(initial=0.0))
    return _Difference(error if np.isfinite(error) else float("inf"), tolerance * max(1.0, size))


def _require_within(
    found: list[dict[str, _Difference]],
    own: list[list[dict[str, _Difference]]],
    clip: CheckClip,
    subject: str,
    hint: str | None,
) -> None:
    """Bound the difference at every step by what the reference's own runs reached up to that step."""
    reached = 0.0
    for t, (differences, *runs) in enumerate(zip(found, *own, strict=True)):
        reached = max([reached, *(each.error for run in runs for each in run.values())])
        for name, each in differences.items():
            limit = max(each.limit, AMPLIFIED * reached if np.isfinite(reached) else 0.0)
            if not each.error <= limit:
                raise ParityError(
                    f"{name}: differs from {subject} by {each.error:.3g} at step {t} of {clip.steps} ({clip.name}); "
                    f"the limit is {limit:.3g}",
                    hint=hint,
                )
