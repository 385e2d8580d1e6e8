"""Step-model protocol: the interface that a torch module needs to be exported.

A step model is a `torch.nn.Module` whose `forward(x..., *states)` returns `(y..., *new_states)`
and which lists its inputs, outputs and states as specs. New states have the order of `states`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stepcell.contract import CellSpec, StateSpec, TensorSpec
from stepcell.dims import bind, resolve

__all__ = ["RecurrentCell", "StepModule", "cell_specs", "initial_states", "is_step_module", "run_sequence"]


@runtime_checkable
class RecurrentCell(Protocol):
    """Protocol of a cell that is listed in the contract, fused or not."""

    def cell_spec(self, name: str) -> CellSpec: ...


@runtime_checkable
class StepModule(Protocol):
    """Protocol of a step model; any `nn.Module` with these three attributes follows it.

    Attributes:
        inputs: data inputs, in the order of `forward`'s first arguments.
        outputs: data outputs, in the order `forward` returns them.
        states: hidden states, in the order of `forward`'s remaining arguments and results.

    Two more attributes are optional. `examples` (a dict) gives the sizes to trace with for symbols that
    cannot be 256. `initial` (a mapping by state name) gives the value of a state before the first step if it
    is not zero: a tensor of the state's shape without the batch axis, or of size 1 along any axis.
    """

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[TensorSpec]: ...
    @property
    def states(self) -> Sequence[StateSpec]: ...
    @property
    def __call__(self) -> Callable[..., tuple[Tensor, ...]]: ...


def is_step_module(module: object) -> bool:
    """Whether `module` is a torch module that follows the step-model protocol."""
    return isinstance(module, nn.Module) and isinstance(module, StepModule)


def cell_specs(module: nn.Module) -> tuple[CellSpec, ...]:
    """Contract entries of the recurrent cells in a module (those with a `cell_spec` method), named by path."""
    return tuple(
        child.cell_spec(path or "cell") for path, child in module.named_modules() if isinstance(child, RecurrentCell)
    )


def initial_states(model: StepModule, *inputs: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """States before the first step: zeros, or the values of the module's `initial`, with gradients.

    Args:
        inputs: data inputs of the first step; the states' shapes and device follow from them.
        dtype: dtype of the states; by default that of the first input.
    """
    symbols = bind((spec.name, spec.shape, tensor.shape) for spec, tensor in zip(model.inputs, inputs, strict=True))
    values = getattr(model, "initial", {})
    options: dict[str, Any] = {"dtype": dtype or inputs[0].dtype, "device": inputs[0].device}
    states = []
    for state in model.states:
        shape = resolve(state.shape, symbols)
        value = values[state.name].to(**options) if state.name in values else None
        if value is None:
            states.append(torch.zeros(shape, **options))
        else:
            value = value if state.batch_axis is None else value.unsqueeze(state.batch_axis)
            states.append(value.expand(shape).contiguous())
    return tuple(states)


def run_sequence(
    model: StepModule, x: Tensor, states: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a model with one input and one output over a clip; for training and offline use.

    Args:
        x: (T, B, ...) frames.
        states: states before the first frame; by default those of `initial_states`.

    Returns:
        y (T, B, ...) and the states after the last frame.
    """
    if states is None:
        states = initial_states(model, x[0])
    outputs = []
    for frame in x:
        y, *new_states = model(frame, *states)
        states = tuple(new_states)
        outputs.append(y)
    return torch.stack(outputs), states
