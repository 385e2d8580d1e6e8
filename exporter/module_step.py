"""One step of a torch module as a reference: in float64, from the exact weights or from those the file holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from stepcell.contract import StepContract
from stepcell.exporter.floats import Floats

__all__ = ["Step", "StepJvp", "module_jvp", "module_step"]

Arrays = dict[str, NDArray[Any]]
Step = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]
StepJvp = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays, Arrays, Arrays]]


def module_step(model: nn.Module, contract: StepContract, *, precision: str | None = None) -> Step:
    """One step of the module in float64.

    Args:
        precision: round the weights and the numbers in the code to this dtype first, as a file of this precision has
            them; None: as they are.
    """
    wide = _in_float64(model, precision)
    constants = None if precision is None else getattr(torch, precision)

    def step(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        with torch.no_grad(), Floats(torch.float64, constants=constants):
            results = wide(*_tensors(contract, inputs, states))
        return _named(contract, [result.numpy() for result in results])

    return step


def module_jvp(model: nn.Module, contract: StepContract) -> StepJvp:
    """The step in float64 with its derivative along a change of the states, by forward-mode differentiation."""
    wide = _in_float64(model, None)

    def step(inputs: Arrays, states: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        arguments = _tensors(contract, inputs, states)
        zero = [torch.zeros_like(each) for each in arguments]
        for place, state in enumerate(contract.states, len(contract.inputs)):
            if state.name in tangents:
                zero[place] = torch.from_numpy(tangents[state.name]).to(zero[place].dtype)
        # integers have no tangent: they are bound, not differentiated
        moving = [place for place, each in enumerate(arguments) if each.is_floating_point()]

        def of_floats(*floats: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = dict(zip(moving, floats, strict=True))
            with Floats(torch.float64):
                return tuple(wide(*[given.get(place, each) for place, each in enumerate(arguments)]))

        primals, tangent = (tuple(each[place] for place in moving) for each in (arguments, zero))
        values, changes, *_ = torch.func.jvp(of_floats, primals, tangent)
        outputs, new = _named(contract, [each.detach().numpy() for each in values])
        along_outputs, along_states = _named(contract, [each.detach().numpy() for each in changes])
        return outputs, new, along_outputs, along_states

    return step


def _in_float64(model: nn.Module, precision: str | None) -> nn.Module:
    copied = copy.deepcopy(model)
    if precision is not None:
        copied = copied.to(getattr(torch, precision))
    for parameter in copied.parameters():
        parameter.requires_grad = False
    return copied.double().eval()


def _tensors(contract: StepContract, inputs: Mapping[str, Any], states: Mapping[str, Any]) -> list[torch.Tensor]:
    arrays = [inputs[spec.name] for spec in contract.inputs] + [states[state.name] for state in contract.states]
    tensors = [torch.from_numpy(array) for array in arrays]
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def _named(contract: StepContract, arrays: list[NDArray[Any]]) -> tuple[Arrays, Arrays]:
    outputs = {spec.name: array for spec, array in zip(contract.outputs, arrays, strict=False)}
    new = arrays[len(contract.outputs) :]
    return outputs, {state.name: array for state, array in zip(contract.states, new, strict=True)}
