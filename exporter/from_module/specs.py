"""Specs of a lifted model: names and shapes of its inputs, outputs and states."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.contract import DType, StateSpec, TensorSpec
from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import Inputs, Starts, random, state_leaves
from stepcell.exporter.from_module.find_states import outputs_of
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.from_module.names import names_of_outputs, names_of_states
from stepcell.exporter.from_module.sizes import Shapes, symbolic_shapes
from stepcell.exporter.from_module.stream_rows import axes_of_size, independent_axes
from stepcell.exporter.step_onnx.contract import TORCH_DTYPES
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

    result, memory = interface.first(copy.deepcopy(original), data, starts)
    names = names_of_outputs(outputs_of(result, interface.arguments))
    outputs, leaves = interface.outputs(result), state_leaves(memory)
    shapes = symbolic_shapes(
        {name: tuple(t.shape) for name, t in {**data, **starts}.items() if t is not None}, dynamic, measure, len(names)
    )

    def spec(name: str, shape: tuple[Any, ...], dtype: torch.dtype, multiple: int = 1) -> TensorSpec:
        layout = natural_layout(shape)
        return TensorSpec(
            name=name,
            shape=shape,
            dtype=_dtype(name, dtype),
            layout=layout,
            pad_multiple=multiple if layout else 1,
        )

    model.inputs = [spec(name, shapes.inputs[name], data[name].dtype, shapes.pad_multiple) for name in data]
    model.outputs = [
        spec(name, shape, tensor.dtype) for name, shape, tensor in zip(names, shapes.measured, outputs, strict=False)
    ]
    axes = _stream_axes(model, original, shapes, [*outputs, *leaves], starts)
    model.output_axes = axes[: len(names)]
    names_of = names_of_states(interface.places, model.tensors, [None] * len(model.tensors))
    model.states = []
    for name, shape, axis, leaf in zip(
        names_of, shapes.measured[len(names) :], axes[len(names) :], leaves, strict=True
    ):
        model.states.append(StateSpec(name=name, shape=shape or (1,), batch_axis=axis, dtype=_dtype(name, leaf.dtype)))
    model.example_shapes = {name: tuple(tensor.shape) for name, tensor in data.items()}


def _stream_axes(
    model: LiftedModel, original: nn.Module, shapes: Shapes, tensors: Sequence[Tensor], starts: Starts
) -> list[int | None]:
    """The axis of each output and state that counts streams: it grows with the batch, and its rows are independent.

    Where the module runs at one size of the batch only, the axis has that size. Where a state has no such axis, the
    model steps one stream, and none has one.

    Args:
        tensors: outputs and states after a first call.
    """
    axes: list[int | None] | None
    if shapes.batch == 1:  # one row is one stream
        ones = [axes_of_size(tensor.shape or (1,), 1)[0] for tensor in tensors]
        axes = [one if axis is None else axis for axis, one in zip(shapes.batch_axes, ones, strict=True)]
    else:
        inputs = {name: random(shape, index) for index, (name, shape) in enumerate(shapes.several.items())}
        frame = {name: tensor for name, tensor in inputs.items() if name not in starts}
        begin = {name: torch.zeros_like(inputs[name]) if name in inputs else None for name in starts}
        _, memory = model.interface.first(copy.deepcopy(original), frame, begin)
        choices: list[list[int | None]] = [[axis] for axis in shapes.batch_axes]
        if not shapes.batch_grows:
            choices = [axes_of_size(tensor.shape, int(shapes.batch)) for tensor in tensors]
        states = [leaf.reshape(leaf.shape or (1,)) for leaf in state_leaves(memory)]
        axes = independent_axes(
            model, list(frame.values()), states, [shapes.input_axes[name] for name in frame], choices
        )
    count = len(model.tensors)
    return [None] * len(tensors) if axes is None or None in axes[len(axes) - count :] else axes


def _dtype(name: str, dtype: torch.dtype) -> DType:
    """The dtype in a spec; floats are float32 there, and become what the export asks for."""
    if dtype.is_floating_point:
        return "float32"
    for known, each in TORCH_DTYPES.items():
        if each == dtype:
            return known  # type: ignore[return-value]
    raise ExportError(f"{name}: a file cannot hold {dtype}", hint="convert it, such as with .to(torch.int64)")
