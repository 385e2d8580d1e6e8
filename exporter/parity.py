"""Strict equality of two step models, step by step from the same states, and the clips that checks run over.

Used by all three ways in: a lifted module against the user's module, an exported file against its
module, a fused file against the original file. Every step starts from the states of the reference, so a model that
amplifies rounding from step to step does not amplify it here; what rounding adds up to in a free run is measured in
`stepcell.exporter.rounding`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import ParityError
from stepcell.exporter.differences import Difference, difference
from stepcell.sample_frames import random_frame, smooth_frame

__all__ = [
    "TOLERANCE",
    "Array",
    "Arrays",
    "CheckClip",
    "FileRun",
    "Model",
    "Run",
    "Seen",
    "Step",
    "check_equal",
    "differs",
    "fed_back",
    "file_step",
    "noting",
    "random_clip",
    "smooth_clip",
    "tensor_names",
]

# Largest |error| that is accepted without a closer look, relative to max(1, largest |value| of that tensor), by
# precision. A wrong convention (gate order, reset placement) causes an error of 0.1 or more, so it cannot hide below.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2}

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


def tensor_names(
    contract: StepContract, inputs: Mapping[str, str] | None = None, outputs: Mapping[str, str] | None = None
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """By state, the names of its input and its output in a file; the contract's by default."""
    return (
        inputs or {state.name: state.input for state in contract.states},
        outputs or {state.name: state.output for state in contract.states},
    )


def file_step(
    run: FileRun,
    contract: StepContract,
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Step:
    """A loaded file as a step.

    Args:
        run: the file as a function of arrays by name, such as an `OnnxSession`.
        inputs, outputs: as in `tensor_names`.
    """
    inputs, outputs = tensor_names(contract, inputs, outputs)

    def step(data: Arrays, states: Arrays) -> Arrays:
        results = run({**data, **{inputs[name]: array for name, array in states.items()}})
        new = {name: results[target] for name, target in outputs.items()}
        return {**{spec.name: results[spec.name] for spec in contract.outputs}, **new}

    return step


def check_equal(
    reference: Model,
    step: Step,
    clips: Sequence[CheckClip],
    tolerance: float,
    *,
    subject: str,
    hint: str | None = None,
) -> None:
    """Compare every output and state at every step of the reference's run, each step from the reference's states.

    Args:
        reference: the model whose results are taken as correct; each step returns all states of the clip.
        tolerance: see `difference`.
        subject: what messages call the reference, such as "the original file".
        hint: hint in the error.

    Raises:
        ParityError: the difference is larger, or a shape differs.
        ExportError: the reference returns NaN.
    """
    for clip in clips:
        run, states = reference(clip), clip.states
        for t, data in enumerate(clip):
            expected, got = run(data), step(data, states)
            for name, truth in expected.items():
                found = difference(name, truth, got[name], tolerance, subject, t)
                if found.is_beyond:
                    raise differs(name, subject, found, t, clip, hint)
            states = {name: expected[name] for name in states}


def differs(name: str, subject: str, found: Difference, t: int, clip: CheckClip, hint: str | None) -> ParityError:
    """The error for a difference beyond its limit."""
    return ParityError(
        f"{name}: differs from {subject} {found.said} at step {t} of {clip.steps} ({clip.name})", hint=hint
    )


def noting(step: Step, seen: Seen | None) -> Step:
    """A step that notes the smallest and the largest value of every result in `seen`."""
    if seen is None:
        return step

    def noted(data: Arrays, states: Arrays) -> Arrays:
        results = step(data, states)
        for name, array in results.items():
            if array.size:
                low, high = seen.get(name, (np.inf, -np.inf))
                seen[name] = min(low, float(array.min())), max(high, float(array.max()))
        return results

    return noted


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
