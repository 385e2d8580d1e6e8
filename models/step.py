"""The step-model protocol: the one thing a module needs to be exportable.

A step model is a `torch.nn.Module` whose `forward(x..., *states)` returns `(y..., *new_states)`
and which lists its inputs, outputs and states as specs. New states come in the order of `states`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

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

    A module may also have `examples`, a dict: sizes to export with for symbols that 256 does not suit.
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
    """Zero states of the right shapes for these inputs, on the device of the first one.

    Args:
        dtype: dtype of the states; the first input's by default.
    """
    symbols: dict[str, int] = {}
    for spec, tensor in zip(model.inputs, inputs, strict=True):
        symbols = bind(spec.name, spec.shape, tensor.shape, symbols)
    return tuple(
        torch.zeros(resolve(state.shape, symbols), dtype=dtype or inputs[0].dtype, device=inputs[0].device)
        for state in model.states
    )


def run_sequence(
    model: StepModule, x: Tensor, states: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Step a one-input, one-output model over a clip; for training and offline use.

    Args:
        x: (T, B, ...) frames.
        states: states before the first frame; zeros by default.

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
