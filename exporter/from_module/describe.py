"""Specs of an adopted module: names, shapes, cells."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from stepcell.contract import CellSpec, StateSpec, TensorSpec, state_names
from stepcell.errors import ExportError
from stepcell.exporter.from_module.cells import Found
from stepcell.exporter.from_module.interface import outputs_of
from stepcell.exporter.from_module.model import AdoptedModel, Lifted
from stepcell.exporter.from_module.sizes import symbolic_shapes
from stepcell.exporter.from_module.slots import Inputs, Slot, Starts, random, state_leaves
from stepcell.exporter.from_module.trees import flatten
from stepcell.models.step import RecurrentCell

__all__ = ["describe"]


@dataclass(frozen=True)
class _Spec:
    """What a cell answers when the contract asks; names go without the path to the adopted module."""

    spec: CellSpec

    def __call__(self, name: str) -> CellSpec:
        return self.spec


def describe(
    model: AdoptedModel,
    found: Sequence[Found],
    original: nn.Module,
    data: Inputs,
    starts: Starts,
    dynamic: Sequence[str],
) -> None:
    """Fill in specs: names, shapes, cells."""
    interface = model.interface

    def measure(shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
        tensors = {name: random(shape, 0) for name, shape in shapes.items()}
        begin = {name: torch.zeros_like(tensors[name]) if name in tensors else None for name in starts}
        frame = {name: tensor for name, tensor in tensors.items() if name not in starts}
        result, memory = interface.first(copy.deepcopy(original), frame, begin)
        return [tuple(leaf.shape) for leaf in (*interface.outputs(result), *state_leaves(memory))]

    result, _ = interface.first(copy.deepcopy(original), data, starts)
    names = _output_names(outputs_of(result, interface.arguments))
    shapes = symbolic_shapes(
        {name: tuple(t.shape) for name, t in {**data, **starts}.items() if t is not None}, dynamic, measure
    )

    def spec(name: str, shape: tuple[Any, ...], multiple: int = 1) -> TensorSpec:
        layout = "NCHW" if len(shape) == 4 else None
        return TensorSpec(name=name, shape=shape, layout=layout, pad_multiple=multiple if layout else 1)

    model.inputs = [spec(name, shapes.inputs[name], shapes.pad_multiple) for name in data]
    model.outputs = [spec(name, shape) for name, shape in zip(names, shapes.measured, strict=False)]
    model.states = [
        StateSpec(name=name, shape=shape, batch_axis=axis)
        for name, shape, axis in zip(
            _state_names(model), shapes.measured[len(names) :], shapes.batch_axes[len(names) :], strict=True
        )
    ]
    model.cells = list(found)
    model.example_shapes = {name: tuple(tensor.shape) for name, tensor in data.items()}
    left = {each.path: each.spec for each in found if each.spec.op is None}
    for path, child in list(model.module.named_modules()):
        own: CellSpec | None = child.cell_spec(path) if isinstance(child, RecurrentCell) else None
        own = left.get(path, own)
        if own is not None:
            name = path.removesuffix("canonical").rstrip(".") or "cell"
            child.cell_spec = _Spec(msgspec.structs.replace(own, name=name))


def _state_names(model: AdoptedModel) -> list[str]:
    """The path of a state that the module keeps, else the argument's name; `h0`, `c0`, `h1`, ... for several in one."""
    names: list[str] = []
    places = model.interface.places
    for position, place in enumerate(places):
        own = [state for state in model.layout if state.place == position]
        if isinstance(place, Slot):
            names += [_slot_name(place, state, alone=len(own) == 1) for state in own]
        elif len(model.interface.arguments) > 1 and len(own) == 1:
            names.append(place.name)
        elif all(state.cell is not None for state in own):
            cells = dict.fromkeys(state.cell for state in own)
            names += state_names([[state.role for state in own if state.cell == cell] for cell in cells])
        else:
            names += [place.name] if len(own) == 1 else [f"{place.name}{index}" for index in range(len(own))]
    return names


def _slot_name(slot: Slot, state: Lifted, *, alone: bool) -> str:
    if state.cell is not None:
        return f"{state.cell}.{state.role}" if state.cell else state.role
    return str(slot) if alone else f"{slot}.{state.leaf}"


def _output_names(outputs: Any) -> list[str]:
    """The keys of dicts where every tensor has one of its own; `y`, or `y0`, `y1`, ... otherwise."""
    leaves = flatten(outputs)[0]
    foreign = [type(leaf).__name__ for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]
    if foreign:
        raise ExportError(f"forward returns a {foreign[0]}; a step returns tensors", hint="in tuples, lists and dicts")
    keys = [key for key, leaf in zip(_keys(outputs), leaves, strict=True) if leaf is not None]
    if all(keys) and len(set(keys)) == len(keys):
        return keys
    return ["y"] if len(keys) == 1 else [f"y{index}" for index in range(len(keys))]


def _keys(value: Any, key: str = "") -> list[str]:
    """Of every leaf the innermost dict key above it."""
    if isinstance(value, Mapping):
        return [name for own, child in value.items() for name in _keys(child, str(own))]
    if isinstance(value, (tuple, list)):
        return [name for child in value for name in _keys(child, key)]
    return [key]
