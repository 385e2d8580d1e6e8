"""The step-model protocol: the one thing a module needs to be exportable.

A step model is a `torch.nn.Module` whose `forward(x..., *states)` returns `(y..., *new_states)`
and which lists its inputs, outputs and states as specs. New states come in the order of `states`.
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
    """A cell that the contract lists: canonical ones, and those made of ordinary nodes."""

    def cell_spec(self, name: str) -> CellSpec: ...


@runtime_checkable
class StepModule(Protocol):
    """What the exporter asks of a module; a plain `nn.Module` with these three attributes fits.

    Attributes:
        inputs: data inputs, in the order of `forward`'s first arguments.
        outputs: data outputs, in the order `forward` returns them.
        states: hidden states, in the order of `forward`'s remaining arguments and results.

    A module may also have `examples`, a dict: sizes to export with for symbols that 256 does not suit;
    and `initial`, a mapping: by name the value of a state before its first step where that is not
    zero, of the state's shape without its batch axis, 1 in the place of an axis allowed.
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
    """Whether `module` is a torch module that follows the protocol."""
    return isinstance(module, nn.Module) and isinstance(module, StepModule)


def cell_specs(module: nn.Module) -> tuple[CellSpec, ...]:
    """The recurrent cells inside a module (whatever has a `cell_spec` method), named by their path."""
    return tuple(
        child.cell_spec(path or "cell") for path, child in module.named_modules() if isinstance(child, RecurrentCell)
    )


def initial_states(model: StepModule, *inputs: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """States before the first step, of the right shapes for these inputs, on the device of the first one.

    They are zero, or what the module's `initial` says, gradients included.

    Args:
        dtype: dtype of the states; the first input's by default.
    """
    symbols: dict[str, int] = {}
    for spec, tensor in zip(model.inputs, inputs, strict=True):
        symbols = bind(spec.name, spec.shape, tensor.shape, symbols)
    values = getattr(model, "initial", {})
    options: dict[str, Any] = {"dtype": dtype or inputs[0].dtype, "device": inputs[0].device}
    states = []
    for state in model.states:
        shape = resolve(state.shape, symbols)
        value = values[state.name].to(**options) if state.name in values else None
        if value is None:
            states.append(torch.zeros(shape, **options))
        else:
            states.append(value.unsqueeze(state.batch_axis).expand(shape).contiguous())
    return tuple(states)


def run_sequence(
    model: StepModule, x: Tensor, states: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Step a one-input, one-output model over a clip; for training and offline use.

    Args:
        x: (T, B, ...) frames.
        states: states before the first frame; those of `initial_states` by default.

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
