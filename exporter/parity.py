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
from stepcell.errors import ParityError
from stepcell.exporter.differences import Difference, difference
from stepcell.sample_frames import random_frame, smooth_frame

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
Seen = dict[str, tuple[float, float]]
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
    seen: Seen | None = None,
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
        seen: receives the smallest and the largest value of every output and state of the reference.

    Returns:
        Worst difference per output and state, as `differences.difference` measures floats and integers; `amplified` if
        the tolerance was exceeded.

    Raises:
        ParityError: the difference is larger, or a shape differs.
        ExportError: the reference returns NaN.
    """
    worst: dict[str, float] = {}
    differing: dict[str, float] = {}
    amplified = False
    for clip in clips:
        found = _differences(reference, other, clip, tolerance, subject, seen)
        for name, each in (item for differences in found for item in differences.items()):
            worst[name] = max(worst.get(name, 0.0), each.largest)
            if each.differing is not None:
                differing[name] = max(differing.get(name, 0.0), each.differing)
        if any(each.is_beyond for differences in found for each in differences.values()):
            amplified = True
            own = [_differences(reference, model, clip, tolerance, subject) for model in own_runs()]
            _require_within(found, own, clip, subject, hint)
    return Parity(
        steps=max(clip.steps for clip in clips),
        reference=subject,
        max_abs_error=worst,
        differing=differing,
        amplified=amplified,
    )


def random_clip(
    contract: StepContract, sizes: str, shapes: Mapping[str, Sequence[int]], steps: int, scalars: Arrays | None = None
) -> CheckClip:
    """Independent values over the whole range: the hardest input for a recurrence.

    Args:
        sizes: for messages.
        shapes: shapes of every data input and every state, by name.
        scalars: inputs that keep one value.
    """
    return _clip(f"random frames, {sizes}", _random, contract, shapes, steps, scalars)


def smooth_clip(
    contract: StepContract, sizes: str, shapes: Mapping[str, Sequence[int]], steps: int, scalars: Arrays | None = None
) -> CheckClip:
    """A slowly moving wave: the state converges, so stalls and drift become visible. Arguments as in `random_clip`."""
    return _clip(f"smooth frames, {sizes}", _smooth, contract, shapes, steps, scalars)


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


def _smooth(spec: TensorSpec, shape: tuple[int, ...], _: np.random.Generator, t: int) -> Array:
    return smooth_frame(spec, shape, t)


def _random(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, _: int) -> Array:
    return random_frame(spec, shape, rng)


def _differences(
    reference: Model, other: Model, clip: CheckClip, tolerance: float, subject: str, seen: Seen | None = None
) -> list[dict[str, Difference]]:
    """Both sides over the same frames; a dict per step."""
    expected_run, run = reference(clip), other(clip)
    steps = []
    for t, data in enumerate(clip):
        expected, got = expected_run(data), run(data)
        steps.append(
            {name: difference(name, truth, got[name], tolerance, subject, t) for name, truth in expected.items()}
        )
        for name, truth in expected.items():
            if seen is not None and truth.size:
                low, high = seen.get(name, (np.inf, -np.inf))
                seen[name] = min(low, float(truth.min())), max(high, float(truth.max()))
    return steps


def _require_within(
    found: list[dict[str, Difference]],
    own: list[list[dict[str, Difference]]],
    clip: CheckClip,
    subject: str,
    hint: str | None,
) -> None:
    """Bound the difference at every step by what the reference's own runs reached up to that step."""
    reached = {"values": 0.0, "share": 0.0}
    for t, (differences, *runs) in enumerate(zip(found, *own, strict=True)):
        for each in (each for run in runs for each in run.values()):
            reached[each.measure] = max(reached[each.measure], each.error)
        for name, each in differences.items():
            most = reached[each.measure]
            limit = max(each.limit, AMPLIFIED * most if np.isfinite(most) else 0.0)
            if not each.error <= limit:
                raise ParityError(
                    f"{name}: differs from {subject} {each.said(limit)} at step {t} of {clip.steps} ({clip.name})",
                    hint=hint,
                )
