"""Models of unusual interfaces: no state, a state of integers, a batch fixed at two rows, two inputs."""

from __future__ import annotations

import numpy as np

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.runtime.verify.clips import random_clip, sizes_for
from stepcell.runtime.verify.results import failed
from stepcell.runtime.verify.stepper import Arrays, FunctionStepper, rounded
from stepcell.runtime.verify.verification import Findings, Reference, VerifyOptions, verify
from tests.runtime.verify.cells import Function, numeric_jvp

PLAN = VerifyOptions(steps=8, still=8, window=8, lyapunov=8)


def look(function: Function, spec: StepContract, *, differentiable: bool = True) -> Findings:
    jvp = numeric_jvp(function) if differentiable else None
    exact = FunctionStepper(function, spec, "float64", wide=True, jvp=jvp)

    def narrow(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        outputs, new = function(inputs, states)
        return rounded(spec.outputs, outputs), rounded(spec.states, new)

    clip = random_clip(spec, sizes_for(spec))
    return verify(FunctionStepper(narrow, spec, "float32"), Reference(exact), clip, PLAN)


def asked(found: Findings) -> set[str]:
    assert not failed(found.verdicts), failed(found.verdicts)
    return {verdict.name for verdict in found.verdicts if verdict.passed is not None}


def spec_of(shape: tuple[int | str, ...], *states: StateSpec, inputs: tuple[str, ...] = ("x",)) -> StepContract:
    return StepContract(
        inputs=tuple(TensorSpec(name=name, shape=shape) for name in inputs),
        outputs=(TensorSpec(name="y", shape=shape),),
        states=states,
    )


def test_a_model_without_states() -> None:
    found = look(lambda inputs, _: ({"y": inputs["x"] * np.float32(0.3)}, {}), spec_of(("batch", 4)))
    assert {"growth", "reset", "resume"} <= asked(found)


def test_a_state_of_integers_counts_the_steps() -> None:
    spec = spec_of(
        ("batch", 4), StateSpec(name="h", shape=("batch", 4)), StateSpec(name="n", shape=("batch",), dtype="int64")
    )

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        h = states["h"] * inputs["x"].dtype.type(0.5) + inputs["x"]
        count = states["n"] + 1
        return {"y": h * np.minimum(count, 2)[:, None].astype(h.dtype)}, {"h": h, "n": count}

    assert {"growth", "prediction", "bound", "liveness", "isolation", "reset", "resume"} <= asked(look(step, spec))


def test_a_batch_fixed_at_two_rows_and_two_inputs() -> None:
    spec = spec_of((2, 4), StateSpec(name="h", shape=(2, 4)), inputs=("x", "gain"))

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        h = states["h"] * inputs["x"].dtype.type(0.5) + inputs["x"] * inputs["gain"]
        return {"y": h}, {"h": h}

    assert {"growth", "prediction", "isolation", "reset", "resume"} <= asked(look(step, spec))


def test_a_reference_without_a_jacobian() -> None:
    spec = spec_of(("batch", 4), StateSpec(name="h", shape=("batch", 4)))

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        h = states["h"] * inputs["x"].dtype.type(0.5) + inputs["x"]
        return {"y": h}, {"h": h}

    found = asked(look(step, spec, differentiable=False))
    assert "bound" not in found
    assert "prediction" in found


def test_a_model_that_amplifies_has_no_bound() -> None:
    """The logistic map at its chaotic end, of a mean factor of 2 a step."""
    spec = spec_of(("batch", 64), StateSpec(name="h", shape=("batch", 64)))

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        h = states["h"] * 0.9 + inputs["x"] * 0.1 + 0.1
        new = (4 * h * (1 - h)).clip(0, 1)
        return {"y": new}, {"h": new}

    found = look(step, spec)
    verdict = next(each for each in found.verdicts if each.name == "bound")
    assert verdict.passed is None
    assert "no bound exists" in verdict.says
