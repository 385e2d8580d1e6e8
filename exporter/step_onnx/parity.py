"""Compare an exported model with its torch module over many steps, state fed back.

The reference is the module in float64; the file runs in ONNX Runtime on the CPU. Each side feeds
back its own states, so an error that accumulates shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepcell.contract import Parity, StateSpec, StepContract, TensorSpec
from stepcell.dims import resolve
from stepcell.errors import ExportError, ParityError
from stepcell.exporter.step_onnx.plan import sizes_for_check

__all__ = ["STEPS", "TOLERANCE", "check_parity", "frames_random", "frames_smooth", "stepper"]

STEPS = 32
# Largest accepted |error| per step, relative to max(1, largest |value| of that tensor), by
# (precision, state dtype). float32 sums in another order; float16 rounds weights and activations
# to 11 bits; a float16 state is rounded once more at every step. A wrong convention (gate order,
# reset placement) is off by 0.1 or more, so it cannot hide below these.
TOLERANCE = {
    ("float32", "float32"): 1e-4,
    ("float32", "float16"): 5e-2,
    ("float16", "float32"): 2e-2,
    ("float16", "float16"): 5e-2,
}

AMPLIFIED = 4.0  # two runs of the same precision round in different places
OWN_RUNS = 3  # of the module: what it amplifies differs from one rounding to the next

Array = NDArray[np.generic]
Step = Callable[[dict[str, Array], dict[str, Array]], tuple[dict[str, Array], dict[str, Array]]]


def check_parity(model: nn.Module, onnx_bytes: bytes, contract: StepContract, steps: int = STEPS) -> Parity:
    """Run both sides over random and smooth frames; also check that every state matters.

    A model may amplify rounding, within a step and from step to step. Where the file is beyond the
    tolerance, the module itself is run in the file's precision, as it is and with its frames nudged
    by their last bit: the file may differ from float64 by what the module does, times `AMPLIFIED`,
    and no more.

    Args:
        model: the module in float32, weights as in the checkpoint.

    Returns:
        Worst absolute difference per output and state, over all steps and both kinds of frames.

    Raises:
        ParityError: beyond that.
        ExportError: ONNX Runtime does not load the file, or a state changes nothing.
    """
    reference = _torch_step(copy.deepcopy(model).double(), contract, wide=True)
    exported = stepper(onnx_bytes, contract)
    worst = {spec.name: 0.0 for spec in contract.graph_outputs.values()}
    amplified = False
    for sizes in sizes_for_check(contract):
        for frames in (frames_random, frames_smooth):
            found = _differences(reference, exported, contract, sizes, frames, steps)
            for difference in found:
                worst = {name: max(value, difference[name].error) for name, value in worst.items()}
            if any(each.beyond for difference in found for each in difference.values()):
                amplified = True
                narrow = copy.deepcopy(model).half() if contract.precision == "float16" else model
                own = []
                for run in range(OWN_RUNS):
                    module = _nudged(_torch_step(narrow, contract, wide=False), run)
                    own.append(_differences(reference, module, contract, sizes, frames, steps))
                where = f"{frames.__name__.removeprefix('frames_')} frames, sizes {dict(sizes)}"
                _require_within(found, own, contract.precision, where)
    _check_liveness(exported, contract, sizes_for_check(contract)[-1])
    return Parity(steps=steps, reference="torch float64", max_abs_error=worst, amplified=amplified)


def stepper(onnx_bytes: bytes, contract: StepContract) -> Step:
    """One step of the file in plain ONNX Runtime: (inputs, states) -> (outputs, new states)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class per failure and no common base
        raise ExportError(f"ONNX Runtime does not load the exported file: {error}") from error
    names = list(contract.graph_outputs)

    def step(inputs: dict[str, Array], states: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        feeds = {**inputs, **{state.input: states[state.name] for state in contract.states}}
        results = dict(zip(names, session.run(names, feeds), strict=True))
        outputs = {spec.name: results[spec.name] for spec in contract.outputs}
        return outputs, {state.name: results[state.output] for state in contract.states}

    return step


def frames_random(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, _: int) -> Array:
    """Independent values over the whole range: the hardest input for a recurrence."""
    if not spec.dtype.startswith("float"):
        return rng.integers(0, 2, shape).astype(spec.dtype)
    low, high = spec.range or (-1.0, 1.0)
    return rng.uniform(low, high, shape).astype(spec.dtype)


def frames_smooth(spec: TensorSpec, shape: tuple[int, ...], _: np.random.Generator, t: int) -> Array:
    """A slowly moving wave: the state converges, so a stalled or drifting one shows."""
    if not spec.dtype.startswith("float"):
        return np.zeros(shape, spec.dtype)
    low, high = spec.range or (-1.0, 1.0)
    phase = np.zeros((1,) * len(shape))
    for axis, size in enumerate(shape):
        ramp = np.arange(size) * 0.13 * (axis + 1)
        phase = phase + ramp.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    wave = 0.5 + 0.45 * np.sin(phase + 0.05 * t)
    return (low + (high - low) * wave).astype(spec.dtype)


def _torch_step(model: nn.Module, contract: StepContract, *, wide: bool) -> Step:
    """The module as a step: in float64, or in the contract's dtypes."""

    def step(inputs: dict[str, Array], states: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        tensors = [torch.from_numpy(array) for array in (*inputs.values(), *states.values())]
        with torch.no_grad():
            results = model(*(t.double() if wide and t.is_floating_point() else t for t in tensors))
        arrays = [result.numpy() for result in results]
        outputs = {spec.name: array for spec, array in zip(contract.outputs, arrays, strict=False)}
        new = arrays[len(contract.outputs) :]
        return outputs, {state.name: array for state, array in zip(contract.states, new, strict=True)}

    return step


def _nudged(step: Step, run: int) -> Step:
    """The same step with every frame off by at most its last bit; run 0 as it is."""
    rng = np.random.default_rng(run)

    def nudge(array: Array) -> Array:
        if run == 0 or array.dtype.kind != "f":
            return array
        factors: NDArray[Any] = 1 + float(np.finfo(array.dtype.name).eps) * rng.integers(-1, 2, array.shape)
        return np.asarray(factors * array, array.dtype)

    return lambda inputs, states: step({name: nudge(array) for name, array in inputs.items()}, states)


@dataclass(frozen=True)
class _Difference:
    """Of one output or state at one step: largest absolute error, and what is accepted without asking."""

    error: float
    limit: float

    @property
    def beyond(self) -> bool:
        return not self.error <= self.limit


def _differences(
    reference: Step,
    other: Step,
    contract: StepContract,
    sizes: Mapping[str, int],
    frames: Callable[[TensorSpec, tuple[int, ...], np.random.Generator, int], Array],
    steps: int,
) -> list[dict[str, _Difference]]:
    """Both sides over the same frames, each feeding back its own states; a dict per step."""
    rng = np.random.default_rng(0)
    states: dict[str, Array] = {state.name: _start(state, sizes) for state in contract.states}
    wide: dict[str, Array] = {name: array.astype(np.float64) for name, array in states.items()}
    tolerance = max(
        (TOLERANCE[contract.precision, state.dtype] for state in contract.states),
        default=TOLERANCE[contract.precision, "float32"],
    )
    differences = []
    for t in range(steps):
        inputs = {spec.name: frames(spec, resolve(spec.shape, sizes), rng, t) for spec in contract.inputs}
        expected, wide = reference(inputs, wide)
        got, states = other(inputs, states)
        found = {}
        for name, value in {**got, **states}.items():
            truth = {**expected, **wide}[name].astype(np.float64)
            error = float(np.abs(value.astype(np.float64) - truth).max())
            limit = tolerance * max(1.0, float(np.abs(truth).max()))
            found[name] = _Difference(error if np.isfinite(error) else float("inf"), limit)
        differences.append(found)
    return differences


def _require_within(
    found: list[dict[str, _Difference]], own: list[list[dict[str, _Difference]]], precision: str, where: str
) -> None:
    """What the module's own runs reached by a step bounds what the file may differ at that step."""
    reached = 0.0
    for t, (difference, *runs) in enumerate(zip(found, *own, strict=True)):
        reached = max(reached, *(each.error for run in runs for each in run.values()))
        for name, each in difference.items():
            limit = max(each.limit, AMPLIFIED * reached if np.isfinite(reached) else 0.0)
            if not each.error <= limit:
                raise ParityError(
                    f"{name}: differs from torch float64 by {each.error:.3g} at step {t} ({where}); the limit is "
                    f"{limit:.3g} in {precision}",
                    hint="try --precision float32; if it passes there, the model needs more than float16 has",
                )


def _check_liveness(exported: Step, contract: StepContract, sizes: Mapping[str, int]) -> None:
    rng = np.random.default_rng(1)
    inputs = {spec.name: frames_random(spec, resolve(spec.shape, sizes), rng, 0) for spec in contract.inputs}
    start = {state.name: _start(state, sizes) for state in contract.states}
    base = exported(inputs, start)
    for state in contract.states:
        nudge = rng.uniform(-0.5, 0.5, start[state.name].shape)
        nudged = {**start, state.name: (start[state.name] + nudge).astype(state.dtype)}
        changed = exported(inputs, nudged)
        if all(np.array_equal(a[k], b[k]) for a, b in zip(base, changed, strict=True) for k in a):
            raise ExportError(f"state {state.name}: changes no output and no state; is it wired in forward?")


def _start(state: StateSpec, sizes: Mapping[str, int]) -> NDArray[Any]:
    return state.initial(resolve(state.shape, sizes)).copy()
