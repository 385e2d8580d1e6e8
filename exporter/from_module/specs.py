"""Specs of a lifted model: names and shapes of its inputs, outputs and states."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stepcell.contract import DType, StateSpec, TensorSpec
from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import Inputs, Starts, random, state_leaves
from stepcell.exporter.from_module.find_states import outputs_of
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.from_module.names import names_of_outputs, names_of_states
from stepcell.exporter.from_module.sizes import symbolic_shapes
from stepcell.pixels import natural_layout

__all__ = ["fill_in_specs"]


def fill_in_specs(
    model: LiftedModel, original: nn.Module, data: Inputs, starts: Starts, dynamic: Sequence[str]
) -> None:
    """Set inputs, outputs, states and example shapes of a model, from calls of the original module.

    Raises:
        ExportError: an output is no tensor, or a size that should be dynamic is no fixed multiple or
            fraction of an input size.
    """
    interface = model.interface

    def measure(shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
        tensors = {name: random(shape, 0) for name, shape in shapes.items()}
        begin = {name: torch.zeros_like(tensors[name]) if name in tensors else None for name in starts}
        frame = {name: tensor for name, tensor in tensors.items() if name not in starts}
        result, memory = interface.first(copy.deepcopy(original), frame, begin)
        return [tuple(leaf.shape) for leaf in (*interface.outputs(result), *state_leaves(memory))]

    result, _ = interface.first(copy.deepcopy(original), data, starts)
    names = names_of_outputs(outputs_of(result, interface.arguments))
    shapes = symbolic_shapes(
        {name: tuple(t.shape) for name, t in {**data, **starts}.items() if t is not None}, dynamic, measure
    )

    def spec(name: str, shape: tuple[Any, ...], multiple: int = 1, dtype: DType = "float32") -> TensorSpec:
        layout = natural_layout(shape)
        return TensorSpec(name=name, shape=shape, dtype=dtype, layout=layout, pad_multiple=multiple if layout else 1)

    model.inputs = [spec(name, shapes.inputs[name], shapes.pad_multiple) for name in data]
    dtypes = [_dtype(name, tensor) for name, tensor in zip(names, interface.outputs(result), strict=True)]
    model.outputs = [
        spec(name, shape, dtype=dtype) for name, shape, dtype in zip(names, shapes.measured, dtypes, strict=False)
    ]
    model.states = [
        StateSpec(name=name, shape=shape, batch_axis=axis)
        for name, shape, axis in zip(
            names_of_states(interface.places, model.tensors, [None] * len(model.tensors)),
            shapes.measured[len(names) :],
            shapes.batch_axes[len(names) :],
            strict=True,
        )
    ]
    model.example_shapes = {name: tuple(tensor.shape) for name, tensor in data.items()}


def _dtype(name: str, output: Tensor) -> DType:
    """The dtype of an output in the contract: floats have that of the file."""
    if output.is_floating_point():
        return "float32"
    dtype = str(output.dtype).removeprefix("torch.")
    if dtype not in get_args(DType):
        raise ExportError(f"output {name}: expected one of {', '.join(get_args(DType))}, got {dtype}")
    return dtype  # type: ignore[return-value]
