"""Steppers: one interface for everything that computes a step, so that any two of them can be compared.

`step` of a stepper is stateless: the caller passes the states in and gets the new ones
back. `Running` feeds states back as the implementation under test does, which is what a stream sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.runtime.loop.step_loop import StepLoop

__all__ = [
    "Arrays",
    "Differentiable",
    "Frames",
    "FunctionStepper",
    "LoopStepper",
    "Running",
    "StatelessRunning",
    "Stepper",
    "initial_states",
    "rounded",
]

Array = NDArray[Any]
Arrays = dict[str, Array]


class Frames(Protocol):
    """Data inputs by name, for each number of a step: a `Clip`, or a list."""

    def __getitem__(self, number: int, /) -> Mapping[str, Array]: ...


class Running(Protocol):
    """A free run: states are fed back by the implementation itself."""

    def step(self, inputs: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """One step: outputs by name, and a copy of the states after it."""
        ...

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        """States to their initial value: all of them, or these rows of the batch."""
        ...

    def load(self, states: Mapping[str, Array]) -> None:
        """Replace every state."""
        ...


class Stepper(Protocol):
    """One step from given states.

    Attributes:
        name: for people: what computes, with its version.
        contract: names, shapes and dtypes of inputs, outputs and states as they are computed here.
    """

    name: str
    contract: StepContract

    def step(self, inputs: Mapping[str, Array], states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """Outputs and new states, by name; floats of any width are accepted and rounded to the contract's dtype."""
        ...

    def run(self) -> Running:
        """A free run from the initial states."""
        ...


class Differentiable(Protocol):
    """A step that knows its Jacobian.

    Attributes:
        contract: as in `Stepper`.
    """

    contract: StepContract

    def jvp(
        self, inputs: Mapping[str, Array], states: Mapping[str, Array], tangents: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        """Outputs, new states, and the derivative of both along `tangents`, a change of the states."""
        ...


def rounded(specs: Sequence[Spec], arrays: Mapping[str, Array]) -> Arrays:
    """The arrays in the dtypes of their specs; what is beyond the range of float16 becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {spec.name: np.asarray(arrays[spec.name], spec.dtype, order="C") for spec in specs}


def initial_states(contract: StepContract, inputs: Mapping[str, Array], dtype: Any = None) -> Arrays:
    """States before the first step for inputs of these shapes.

    Args:
        dtype: dtype of the arrays; the contract's by default.
    """
    shapes = contract.state_shapes(contract.bind({name: array.shape for name, array in inputs.items()}))
    return {
        state.name: np.array(state.initial(shapes[state.name]), dtype or np.dtype(state.dtype))
        for state in contract.states
    }


class FunctionStepper:
    """A stepper made of a function.

    Args:
        function: `(inputs, states) -> (outputs, new states)`, pure.
        name, contract: as in `Stepper`.
        jvp: as in `Differentiable`, where there is one.
        wide: the function computes in float64: floats are widened and never rounded to the contract's dtypes.
    """

    def __init__(
        self,
        function: Callable[[Arrays, Arrays], tuple[Mapping[str, Array], Mapping[str, Array]]],
        contract: StepContract,
        name: str,
        *,
        jvp: Callable[..., tuple[Arrays, Arrays, Arrays, Arrays]] | None = None,
        wide: bool = False,
    ) -> None:
        self._function = function
        self._jvp = jvp
        self._wide = wide
        self.contract = contract
        self.name = name

    @property
    def differentiable(self) -> bool:
        """Whether `jvp` works."""
        return self._jvp is not None

    def step(self, inputs: Mapping[str, Array], states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        outputs, new = self._function(*self._arguments(inputs, states))
        return dict(outputs), dict(new)

    def jvp(
        self, inputs: Mapping[str, Array], states: Mapping[str, Array], tangents: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        assert self._jvp is not None
        return self._jvp(*self._arguments(inputs, states), {name: np.asarray(t) for name, t in tangents.items()})

    def run(self) -> Running:
        return StatelessRunning(self)

    def _arguments(self, inputs: Mapping[str, Array], states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        if self._wide:
            return _widened(inputs), _widened(states)
        return rounded(self.contract.inputs, inputs), rounded(self.contract.states, states)


class StatelessRunning:
    """Feeds the states of a stepper back."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._states: Arrays | None = None
        self._reset: Sequence[bool] | None = None

    def step(self, inputs: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        if self._states is None:
            self._states = initial_states(self._stepper.contract, inputs)
        outputs, self._states = self._stepper.step(inputs, self._states)
        return outputs, dict(self._states)

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        if rows is None or self._states is None:
            self._states = None
            return
        states = {name: array.copy() for name, array in self._states.items()}
        for spec in self._stepper.contract.states:
            array, chosen = states[spec.name], np.flatnonzero(rows)
            spec.by_stream(array)[chosen] = spec.by_stream(spec.initial(array.shape))[chosen]
        self._states = states

    def load(self, states: Mapping[str, Array]) -> None:
        self._states = {name: np.array(array) for name, array in states.items()}


class LoopStepper:
    """A `StepLoop` on whatever back end, driven through its public methods alone.

    Args:
        loop: opened without slots and without the check for finite inputs; the caller closes it.
    """

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.contract = loop.contract
        self.name = loop.description

    def step(self, inputs: Mapping[str, Array], states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:  # sizes are fixed by the first step, until a reset
            self._loop.reset()
            self._shapes = shapes
        self._loop.load_state(rounded(self.contract.states, states))
        return self._step(inputs)

    def run(self) -> Running:
        self._loop.reset()
        self._shapes = {}
        return _LoopRunning(self, self._loop)

    def _step(self, inputs: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        outputs = self._loop.step(**rounded(self.contract.inputs, inputs))
        self.name = self._loop.description  # the back end may be chosen in the first step
        return outputs, self._loop.state()


class _LoopRunning:
    def __init__(self, stepper: LoopStepper, loop: StepLoop) -> None:
        self._stepper = stepper
        self._loop = loop

    def step(self, inputs: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        return self._stepper._step(inputs)

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        self._loop.reset(rows)

    def load(self, states: Mapping[str, Array]) -> None:
        self._loop.load_state(states)


def _widened(arrays: Mapping[str, Array]) -> Arrays:
    return {
        name: array.astype(np.float64) if array.dtype.kind == "f" else np.asarray(array)
        for name, array in arrays.items()
    }
