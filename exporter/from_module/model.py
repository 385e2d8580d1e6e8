"""A user's own module as a step model: its states are inputs and outputs of one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.dims import symbols_of
from stepcell.exporter.from_module.attributes import StateAttribute, is_state
from stepcell.exporter.from_module.find_states import Interface
from stepcell.exporter.from_module.graph_cells import replace_cells_of_module
from stepcell.exporter.from_module.names import StateTensor, names_of_states
from stepcell.exporter.from_module.trees import TreeShape, flatten, map_leaves

__all__ = ["LiftedModel"]


class LiftedModel(nn.Module):
    """The step model: forward(inputs..., *states) -> (outputs..., *new states).

    The module's own code computes in the dtype of the inputs; states are converted on entry and exit.
    Its cells are recognised in the graph that `export_onnx` traces, which calls `rewrite_graph`.

    Attributes:
        inputs, outputs, states: as in `stepcell.models.step.StepModule`. States are named after their
            attribute or argument here; `rewrite_graph` renames those of cells.
        example_shapes: shapes of the inputs, by name.
    """

    def __init__(self, module: nn.Module, interface: Interface, names: Sequence[str], memory: Sequence[Any]) -> None:
        super().__init__()
        self.module: nn.Module = module
        self.interface: Interface = interface
        self.names: tuple[str, ...] = tuple(names)
        self.trees: list[tuple[list[Any], TreeShape]] = []
        for value in memory:
            leaves, spec = flatten(value)
            self.trees.append(([None if is_state(leaf) else leaf for leaf in leaves], spec))
        self.tensors: list[StateTensor] = [
            StateTensor(place, index)
            for place, value in enumerate(memory)
            for index, leaf in enumerate(flatten(value)[0])
            if is_state(leaf)
        ]
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.states: list[StateSpec] = []
        self.example_shapes: dict[str, tuple[int, ...]] = {}

    @property
    def symbols(self) -> list[str]:
        """Dynamic sizes."""
        return symbols_of(dim for spec in self.inputs for dim in spec.shape)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        inputs, states = tensors[:count], tensors[count:]
        compute = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
        # A module may write into its attributes in place; the caller's tensors must not change.
        narrow = [
            wide.to(compute).clone() if isinstance(self._place(state), StateAttribute) else wide.to(compute)
            for state, wide in zip(self.tensors, states, strict=True)
        ]
        with self._attributes_kept():
            result, memory = self.interface.step(
                self.module, dict(zip(self.names, inputs, strict=True)), self._memory(narrow)
            )
        new = [flatten(value)[0] for value in memory]
        lifted = [new[state.place][state.leaf].to(wide.dtype) for state, wide in zip(self.tensors, states, strict=True)]
        outputs = [each.to(compute) if each.is_floating_point() else each for each in self.interface.outputs(result)]
        return (*outputs, *lifted)

    def rewrite_graph(self, model: onnx.ModelProto, contract: StepContract) -> tuple[onnx.ModelProto, StepContract]:
        """Replace the cells of the traced graph by ops and name their states after them."""
        return replace_cells_of_module(
            model, contract, lambda owners: names_of_states(self.interface.places, self.tensors, owners)
        )

    def describe(self, contract: StepContract) -> list[str]:
        """What was found, a line per cell and per state of the exported contract."""
        lines = []
        for cell in contract.cells:
            if cell.op is None:
                lines.append(f"left:    {cell.name}: {cell.reason}")
                continue
            size = f"{cell.hidden} channels, kernel {'x'.join(map(str, cell.kernel))}"
            reset = f", reset {cell.reset}" if cell.reset else ""
            lines.append(f"cell:    {cell.name} is {cell.op}, {size}{reset}")
        for tensor, state in zip(self.tensors, contract.states, strict=True):
            place = self._place(tensor)
            kind = "attribute" if isinstance(place, StateAttribute) else "argument"
            lines.append(f"state:   {state.name} ({', '.join(map(str, state.shape))}), {kind} {place}")
        return lines

    def _place(self, state: StateTensor) -> object:
        return self.interface.places[state.place]

    def _memory(self, states: Sequence[Tensor]) -> list[Any]:
        trees = [(list(leaves), spec) for leaves, spec in self.trees]
        for state, tensor in zip(self.tensors, states, strict=True):
            trees[state.place][0][state.leaf] = tensor
        return [spec.unflatten(leaves) for leaves, spec in trees]

    @contextlib.contextmanager
    def _attributes_kept(self) -> Iterator[None]:
        """Restore the module's attributes after a step, as the tracer requires."""
        changing = (*self.interface.attributes, *self.interface.scratch)
        saved = [(attribute, attribute.get(self.module)) for attribute in changing]
        for attribute in self.interface.scratch:
            attribute.set(
                self.module,
                map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, attribute.get(self.module)),
            )
        try:
            yield
        finally:
            for attribute, value in saved:
                attribute.set(self.module, value)
