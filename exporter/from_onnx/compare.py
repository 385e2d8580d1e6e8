"""The adopted file against the original, step by step in ONNX Runtime, each feeding back its own states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np

from stepcell.contract import Parity, StateSpec, StepContract
from stepcell.errors import ExportError, ParityError
from stepcell.exporter.from_onnx.foreign import Array, Run
from stepcell.exporter.from_onnx.probe import Sample
from stepcell.exporter.step_onnx.parity import AMPLIFIED, TOLERANCE, frames_random, frames_smooth

__all__ = ["STEPS", "compare"]

STEPS = 100
_LIVE = 5  # steps at which a state may show that it changes something

Step = Callable[[dict[str, Array], dict[str, Array]], dict[str, Array]]
Errors = list[dict[str, tuple[float, float]]]  # by step and tensor: the error, and what is accepted without asking


def compare(original: Run, adopted: Run, contract: StepContract, samples: Sequence[Sample]) -> Parity:
    """Step both over random frames and over smooth ones, at two sizes where the file has more than one.

    A model may amplify rounding from step to step. Where the two are further apart than the
    tolerance, the original is compared with itself, its frames and states changed in the last bit:
    the adopted file may differ by `AMPLIFIED` times what that makes, and no more.

    Returns:
        Worst absolute difference per output and state.

    Raises:
        ParityError: beyond that.
        ExportError: the original returns NaN, or a state changes nothing.
    """
    inputs = {state.name: state.original_input for state in contract.states}
    outputs = {state.name: state.original_output for state in contract.states}
    before = _step(original, contract, inputs, outputs)
    after = _step(
        adopted, contract, {s.name: s.input for s in contract.states}, {s.name: s.output for s in contract.states}
    )
    worst = dict.fromkeys([*(spec.name for spec in contract.outputs), *inputs], 0.0)
    amplified = False
    for sample, frames in ((samples[0], frames_random), (samples[min(1, len(samples) - 1)], frames_smooth)):
        for scalars in sample.scalars:
            clip = partial(_clip, contract, sample, scalars, frames)
            found = _errors(before, after, contract, sample, clip())
            for errors in found:
                worst = {name: max(value, errors[name][0]) for name, value in worst.items()}
            if any(not error <= limit for errors in found for error, limit in errors.values()):
                amplified = True
                shaken = _errors(before, _shaken(before, contract), contract, sample, clip())
                _require_within(found, shaken, f"{frames.__name__.removeprefix('frames_')} frames, {sample.symbols}")
            _require_live(before, contract, sample, clip())
    return Parity(steps=STEPS, reference="the original file in ONNX Runtime", max_abs_error=worst, amplified=amplified)


def _step(run: Run, contract: StepContract, inputs: Mapping[str, object], outputs: Mapping[str, object]) -> Step:
    """One step: data inputs and states in, outputs and new states out, all by the contract's names."""

    def step(data: dict[str, Array], states: dict[str, Array]) -> dict[str, Array]:
        results = run({**data, **{str(inputs[name]): array for name, array in states.items()}})
        new = {name: results[str(target)] for name, target in outputs.items()}
        return {**{spec.name: results[spec.name] for spec in contract.outputs}, **new}

    return step


def _shaken(step: Step, contract: StepContract) -> Step:
    """The same step on values that differ in the last bit."""
    rng = np.random.default_rng(2)
    ulp = 2.0**-10 if contract.precision == "float16" else 2.0**-23

    def shake(array: Array) -> Array:
        if array.dtype.kind != "f":
            return array
        return (array * (1 + ulp * rng.uniform(-1, 1, array.shape))).astype(array.dtype)

    def shaken(data: dict[str, Array], states: dict[str, Array]) -> dict[str, Array]:
        return step({k: shake(v) for k, v in data.items()}, {k: shake(v) for k, v in states.items()})

    return shaken


def _clip(
    contract: StepContract, sample: Sample, scalars: Mapping[str, Array], frames: Callable[..., Array]
) -> Iterator[dict[str, Array]]:
    rng = np.random.default_rng(0)
    for t in range(STEPS):
        yield {**{spec.name: frames(spec, sample.shapes[spec.name], rng, t) for spec in contract.inputs}, **scalars}


def _errors(
    reference: Step, other: Step, contract: StepContract, sample: Sample, clip: Iterable[dict[str, Array]]
) -> Errors:
    states = {state.name: _zeros(state, sample) for state in contract.states}
    expected, got = states, states
    half = contract.precision == "float16" or any(state.dtype == "float16" for state in contract.states)
    tolerance = TOLERANCE["float16", "float16"] if half else TOLERANCE["float32", "float32"]
    errors: Errors = []
    for t, data in enumerate(clip):
        results, others = reference(data, expected), other(data, got)
        expected, got = ({name: each[name] for name in states} for each in (results, others))
        errors.append({})
        for name, array in results.items():
            truth, value = array.astype(np.float64), others[name].astype(np.float64)
            if np.isnan(truth).any():
                raise ExportError(
                    f"{name}: the original file returns NaN at step {t}, so nothing can be compared",
                    hint="weights with NaN or Inf, or a state that grows without bound?",
                )
            if truth.shape != value.shape:
                raise ParityError(
                    f"{name}: has shape {truth.shape} in the original file and {value.shape} after fusing"
                )
            error = float(np.where(truth == value, 0.0, np.abs(value - truth)).max(initial=0.0))
            size = float(np.abs(truth[np.isfinite(truth)]).max(initial=0.0))
            errors[-1][name] = (error if np.isfinite(error) else float("inf"), tolerance * max(1.0, size))
    return errors


def _require_within(found: Errors, shaken: Errors, where: str) -> None:
    """What the last bit makes of the original by a step bounds what the adopted file may differ at that step."""
    reached = 0.0
    for t, (errors, own) in enumerate(zip(found, shaken, strict=True)):
        reached = max(reached, *(error for error, _ in own.values()))
        for name, (error, limit) in errors.items():
            allowed = max(limit, AMPLIFIED * reached if np.isfinite(reached) else 0.0)
            if not error <= allowed:
                raise ParityError(
                    f"{name}: differs from the original file by {error:.3g} at step {t} ({where}); the limit is "
                    f"{allowed:.3g}; nothing was written"
                )


def _require_live(step: Step, contract: StepContract, sample: Sample, clip: Iterable[dict[str, Array]]) -> None:
    """Each state must change something, at the first step or at a later one: a gate may start shut."""
    rng = np.random.default_rng(1)
    silent = {state.name: state for state in contract.states}
    states = {state.name: _zeros(state, sample) for state in contract.states}
    for data in islice(clip, _LIVE):
        base = step(data, states)
        for name in list(silent):
            changed = step(data, {**states, name: _nudged(states[name], rng)})
            if not all(np.array_equal(base[key], changed[key]) for key in base):
                del silent[name]
        states = {name: base[name] for name in states}
    for state in silent.values():
        raise ExportError(
            f"{state.original_input}: taken for a state, and changes no output of the step",
            hint=f"if it is none: --state {state.original_input}=",
        )


def _nudged(state: Array, rng: np.random.Generator) -> Array:
    if state.dtype == bool:
        return ~state
    step = rng.uniform(-0.5, 0.5, state.shape) if state.dtype.kind == "f" else rng.integers(1, 3, state.shape)
    return np.asarray(state + step).astype(state.dtype)


def _zeros(state: StateSpec, sample: Sample) -> Array:
    return np.zeros(sample.shapes[str(state.original_input)], state.dtype)
