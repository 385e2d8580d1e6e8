"""A user's own module as a step model: states lifted to inputs and outputs, cells made canonical."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec
from stepcell.dims import symbols_of
from stepcell.exporter.from_module.cell import AdoptedCell
from stepcell.exporter.from_module.cells import Found
from stepcell.exporter.from_module.interface import Interface
from stepcell.exporter.from_module.rnn import AdoptedRNN
from stepcell.exporter.from_module.slots import Slot, is_state
from stepcell.exporter.from_module.trees import Spec, flatten, map_leaves

__all__ = ["AdoptedModel", "Lifted"]


@dataclass(frozen=True)
class Lifted:
    """One state tensor: a leaf of a place, and the cell that reads and writes it as it is, if there is one."""

    place: int
    leaf: int
    cell: str | None = None
    role: str = ""


class AdoptedModel(nn.Module):
    """The step model: forward(inputs..., *states) -> (outputs..., *new states).

    Attributes:
        inputs, outputs, states: as the protocol has them.
        cells: every recurrent cell that was found in the module.
        example_shapes: of the inputs, by name.
    """

    def __init__(self, module: nn.Module, interface: Interface, names: Sequence[str], memory: Sequence[Any]) -> None:
        super().__init__()
        self.module, self.interface, self.names = module, interface, tuple(names)
        self.trees: list[tuple[list[Any], Spec]] = []
        for value in memory:
            leaves, spec = flatten(value)
            self.trees.append(([None if is_state(leaf) else leaf for leaf in leaves], spec))
        self.layout = [
            Lifted(place, index)
            for place, value in enumerate(memory)
            for index, leaf in enumerate(flatten(value)[0])
            if is_state(leaf)
        ]
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.states: list[StateSpec] = []
        self.cells: list[Found] = []
        self.example_shapes: dict[str, tuple[int, ...]] = {}

    @property
    def notes(self) -> list[str]:
        """What was found and done, a line per cell and per state."""
        lines = []
        for cell in self.cells:
            where, spec = f"{cell.path or 'the module'} ({cell.kind})", cell.spec
            if spec.op is None:
                lines.append(f"left:    {where}: {spec.reason}")
            else:
                size = f"{spec.hidden} channels, kernel {'x'.join(map(str, spec.kernel))}"
                reset = f", reset {spec.reset}" if spec.reset else ""
                lines.append(f"cell:    {where} is {spec.op}, {size}{reset}")
        for lifted, state in zip(self.layout, self.states, strict=True):
            place = self.interface.places[lifted.place]
            kept = "attribute" if isinstance(place, Slot) else "argument"
            lines.append(f"state:   {state.name} ({', '.join(map(str, state.shape))}), {kept} {place}")
        return lines

    @property
    def symbols(self) -> list[str]:
        """Dynamic sizes."""
        return symbols_of(dim for spec in self.inputs for dim in spec.shape)

    @property
    def narrow_states(self) -> list[str]:
        """States that the module computes outside its cells, so in the compute dtype."""
        return [spec.name for state, spec in zip(self.layout, self.states, strict=True) if state.cell is None]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        inputs, states = tensors[:count], tensors[count:]
        compute = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
        # A module may write into what it keeps; what it is given here belongs to the caller.
        narrow = [
            wide.to(compute).clone() if isinstance(self.interface.places[state.place], Slot) else wide.to(compute)
            for state, wide in zip(self.layout, states, strict=True)
        ]
        for state, wide in zip(self.layout, states, strict=True):
            if state.cell is not None:
                self._cell(state).wide_in[state.role] = wide
        with self._attributes_kept():
            result, memory = self.interface.step(
                self.module, dict(zip(self.names, inputs, strict=True)), self._memory(narrow)
            )
        new = [flatten(value)[0] for value in memory]
        lifted = []
        for state, wide in zip(self.layout, states, strict=True):
            if state.cell is None:
                lifted.append(new[state.place][state.leaf].to(wide.dtype))
            else:
                cell = self._cell(state)
                lifted.append(cell.wide_out[state.role])
        for state in self.layout:
            if state.cell is not None:  # nothing of this step stays behind
                cell = self._cell(state)
                cell.wide_in, cell.wide_out, cell.tensors_in, cell.tensors_out = {}, {}, {}, {}
        return (*self.interface.outputs(result), *lifted)

    def find_owners(self, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Find the states that one cell alone reads and writes: they can pass the rest of the module by."""
        cells = {path: c for path, c in self.module.named_modules() if isinstance(c, (AdoptedCell, AdoptedRNN))}
        calls = dict.fromkeys(cells, 0)
        for path, cell in cells.items():
            cell.register_forward_hook(lambda *_, path=path: calls.update({path: calls[path] + 1}))
        with torch.no_grad(), self._attributes_kept():
            _, memory = self.interface.step(
                self.module, dict(zip(self.names, inputs, strict=True)), self._memory(states)
            )
        new = [flatten(value)[0] for value in memory]
        for position, (state, given) in enumerate(zip(list(self.layout), states, strict=True)):
            for path, cell in cells.items():
                for role in cell.wide_out:
                    reads = cell.tensors_in.get(role) is given
                    if calls[path] == 1 and reads and cell.tensors_out[role] is new[state.place][state.leaf]:
                        self.layout[position] = Lifted(state.place, state.leaf, path, role)
        for cell in cells.values():
            cell._forward_hooks.clear()
            cell.wide_in, cell.wide_out, cell.tensors_in, cell.tensors_out = {}, {}, {}, {}

    def _cell(self, state: Lifted) -> AdoptedCell | AdoptedRNN:
        assert state.cell is not None
        cell = self.module.get_submodule(state.cell)
        assert isinstance(cell, (AdoptedCell, AdoptedRNN))
        return cell

    def _memory(self, states: Sequence[Tensor]) -> list[Any]:
        trees = [(list(leaves), spec) for leaves, spec in self.trees]
        for state, tensor in zip(self.layout, states, strict=True):
            trees[state.place][0][state.leaf] = tensor
        return [spec.unflatten(leaves) for leaves, spec in trees]

    @contextlib.contextmanager
    def _attributes_kept(self) -> Iterator[None]:
        """A step leaves no trace in the module's attributes, which the tracer insists on."""
        changing = (*self.interface.slots, *self.interface.scratch)
        saved = [(slot, slot.get(self.module)) for slot in changing]
        for slot in self.interface.scratch:
            slot.set(
                self.module,
                map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, slot.get(self.module)),
            )
        try:
            yield
        finally:
            for slot, value in saved:
                slot.set(self.module, value)
