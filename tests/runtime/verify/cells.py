"""Small cells in NumPy: the exact step in float64, and the same as a file of some precision would compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.runtime.verify.stepper import Arrays, FunctionStepper, rounded

Array = NDArray[Any]
Function = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]


def contract(states: dict[str, tuple[int | str, ...]], size: int = 32, dtype: Any = "float32") -> StepContract:
    """x (batch, size) -> y (batch, size), with these states."""
    shape = ("batch", size)
    return StepContract(
        inputs=(TensorSpec(name="x", shape=shape, range=(0.0, 1.0)),),
        outputs=(TensorSpec(name="y", shape=shape),),
        states=tuple(StateSpec(name=name, shape=each, dtype=dtype) for name, each in states.items()),
        precision="float16" if dtype == "float16" else "float32",
    )


def exact(function: Function, spec: StepContract, jvp: Any = None) -> FunctionStepper:
    """In float64."""
    return FunctionStepper(function, spec, "float64", wide=True, jvp=jvp or numeric_jvp(function))


def stored(function: Function, spec: StepContract, arithmetic: Any = np.float32) -> FunctionStepper:
    """Computed in `arithmetic`, states and outputs rounded to the contract's dtypes."""

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        wide = [{name: array.astype(arithmetic) for name, array in each.items()} for each in (inputs, states)]
        outputs, new = function(wide[0], wide[1])
        return rounded(spec.outputs, outputs), rounded(spec.states, new)

    return FunctionStepper(step, spec, "stored")


def numeric_jvp(function: Function) -> Any:
    """By complex-free central differences in float64."""

    def jvp(inputs: Arrays, states: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        h = 1e-6
        plus, minus = (
            function(inputs, {name: states[name] + sign * h * tangents.get(name, 0) for name in states})
            for sign in (1, -1)
        )
        outputs, new = function(inputs, states)
        along = [{name: (a[name] - b[name]) / (2 * h) for name in a} for a, b in zip(plus, minus, strict=True)]
        return outputs, new, along[0], along[1]

    return jvp


def slow_memory(z: float) -> Function:
    """h' = h + z (x - h): a memory of 1/z frames."""

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        h, x = states["h"], inputs["x"]
        new = h + x.dtype.type(z) * (x - h)
        return {"y": new}, {"h": new}

    return step


def counting_lstm(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
    """An LSTM whose forget gate is open and which adds x / 2: in float16 its cell freezes at 1024."""
    c = states["c"] + inputs["x"] / 2 + states["h"] / 128
    h = np.tanh(c / 4096)
    return {"y": h}, {"h": h, "c": c}


def gru(seed: int = 0, size: int = 32, bias: float = 0.0) -> Function:
    """A dense GRU; `bias` is added to the update gate: -6 makes it open by some 0.2 % a step."""
    rng = np.random.default_rng(seed)
    W = rng.normal(0, 0.6 / np.sqrt(size), (3, size, size))
    U = rng.normal(0, 0.6 / np.sqrt(size), (3, size, size))

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        x, h = inputs["x"], states["h"]
        w, u = W.astype(x.dtype), U.astype(x.dtype)
        z = _sigmoid(x @ w[0] + h @ u[0] + x.dtype.type(bias))
        r = _sigmoid(x @ w[1] + h @ u[1])
        n = np.tanh(x @ w[2] * 3 + (r * h) @ u[2])
        new = h + z * (n - h)
        return {"y": new}, {"h": new}

    return step


def _sigmoid(a: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-a))
    return result
