"""A user's own module as a step model: its states are inputs and outputs of one step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.dims import symbols_of
from stepcell.exporter.floats import Floats, is_float
from stepcell.exporter.from_module.attributes import (
    Starts,
    StateAttribute,
    attributes_kept,
    cast_attributes,
    is_state,
)
from stepcell.exporter.from_module.find_states import Interface
from stepcell.exporter.from_module.graph_cells import replace_cells_of_module
from stepcell.exporter.from_module.local_states import LocalState
from stepcell.exporter.from_module.names import Owner, StateTensor, names_of_states
from stepcell.exporter.from_module.trees import TreeShape, flatten

__all__ = ["LiftedModel"]

_logger = logging.getLogger(__name__)


class LiftedModel(nn.Module):
    """The step model: forward(inputs..., *states) -> (outputs..., *new states).

    The module's own code computes in the dtype of the inputs; states are converted on entry and exit.
    Its cells are recognised in the graph that `export_onnx` traces, which calls `rewrite_graph`.

    Where the first call does something else than a later one (`fresh`), a step computes both, and the state `started`
    selects, for each row of the batch: 0 before the first frame, 1 after it.

    Attributes:
        inputs, outputs, states: as in `stepcell.models.step.StepModule`. States are named after their
            attribute or argument here; `rewrite_graph` renames those of cells.
        initial: values of states before the first step that are not zero.
        example_shapes: shapes of the inputs, by name.
        fresh: the module before its first call; None: a first call is a step with states at their initial value.
    """

    def __init__(
        self, module: nn.Module, interface: Interface, names: Sequence[str], memory: Sequence[Any], starts: Starts
    ) -> None:
        super().__init__()
        self.module: nn.Module = module
        self.fresh: nn.Module | None = None
        self.interface: Interface = interface
        self.names: tuple[str, ...] = tuple(names)
        self.starts = starts
        self.trees: list[tuple[list[Any], TreeShape]] = []
        for value in memory:
            leaves, spec = flatten(value)
            self.trees.append(([None if is_state(leaf) else leaf for leaf in leaves], spec))
        self.tensors: list[StateTensor] = [
            StateTensor(place, index, leaf.dim() == 0)
            for place, value in enumerate(memory)
            for index, leaf in enumerate(flatten(value)[0])
            if is_state(leaf)
        ]
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.states: list[StateSpec] = []
        self.initial: dict[str, Tensor] = {}
        self.output_axes: list[int | None] = []
        self.example_shapes: dict[str, tuple[int, ...]] = {}
        self._converts = False  # in float16 the module's own conversions to other dtypes are overridden

    @property
    def symbols(self) -> list[str]:
        """Dynamic sizes."""
        return symbols_of(dim for spec in self.inputs for dim in spec.shape)

    @property
    def plain_states(self) -> list[StateSpec]:
        """The states of the module itself, without `started`."""
        return self.states[: len(self.tensors)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        inputs, states = tensors[:count], tensors[count:]
        own = next((p.dtype for p in self.module.parameters() if is_float(p)), torch.float32)
        compute = next((x.dtype for x in inputs if is_float(x)), own)
        if compute != torch.float16 or self._converts:
            return self._both(inputs, states, compute)
        try:
            return self._both(inputs, states, compute)
        except RuntimeError as error:  # dtypes that do not fit each other
            if "type" not in str(error):
                raise
            self._converts = True
        results = self._both(inputs, states, compute)
        _logger.info("note: the module makes or converts tensors to float32 itself: in this file they are float16")
        return results

    def rewrite_graph(self, model: onnx.ModelProto, contract: StepContract) -> tuple[onnx.ModelProto, StepContract]:
        """Replace the cells of the traced graph by ops and name their states after them."""
        return replace_cells_of_module(model, contract, self._names)

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
        for tensor, state in zip(self.tensors, contract.states, strict=False):
            place = self._place(tensor)
            kind = "attribute" if isinstance(place, StateAttribute) else "argument"
            kind = "variable of forward, passed to" if isinstance(place, LocalState) else kind
            lines.append(f"state:   {state.name} ({', '.join(map(str, state.shape))}), {kind} {place}")
        if any(state.batch_axis is None for state in contract.states):
            lines.append(
                "streams: one, since no axis of every state counts streams with rows of their own: "
                "the model takes neither slots nor masks"
            )
        if self.fresh is not None:
            lines.append(
                f"state:   {contract.states[-1].name} ({contract.states[-1].shape[0]}), 0 before the first frame: "
                "forward does something else there, so a step computes both and selects"
            )
        return lines

    def _names(self, owners: Sequence[Owner | None]) -> list[str]:
        names = names_of_states(self.interface.places, self.tensors, owners[: len(self.tensors)])
        return [*names, *(state.name for state in self.states[len(self.tensors) :])]

    def _both(self, inputs: Sequence[Tensor], states: Sequence[Tensor], compute: torch.dtype) -> tuple[Tensor, ...]:
        """A step; where a first call differs, both of them, selected by `started`."""
        own, started = states[: len(self.tensors)], states[len(self.tensors) :]
        later = self._step(inputs, own, compute)
        if self.fresh is None:
            return later
        first = self._first(inputs, own, compute)
        axes = [*self.output_axes, *(state.batch_axis for state in self.plain_states)]
        selected = [
            torch.where(_along(started[0] > 0.5, one.dim(), axis), one, other.to(one.dtype))
            for one, other, axis in zip(later, first, axes, strict=True)
        ]
        return (*selected, torch.clamp(started[0] + 1, max=1))

    def _step(self, inputs: Sequence[Tensor], states: Sequence[Tensor], compute: torch.dtype) -> tuple[Tensor, ...]:
        # A module may write into its attributes in place; the caller's tensors must not change.
        narrow = []
        for state, wide in zip(self.tensors, states, strict=True):
            tensor = wide.to(compute) if is_float(wide) else wide
            tensor = tensor.reshape(()) if state.is_scalar else tensor
            narrow.append(tensor.clone() if isinstance(self._place(state), StateAttribute) else tensor)
        frames = dict(zip(self.names, inputs, strict=True))
        with attributes_kept(self.module, self.interface.changing), self._floats(compute):
            result, memory = self.interface.step(self.module, frames, self._memory(narrow))
        return self._results(result, memory, states, compute)

    def _first(self, inputs: Sequence[Tensor], states: Sequence[Tensor], compute: torch.dtype) -> tuple[Tensor, ...]:
        assert self.fresh is not None
        zeros = self._memory([torch.zeros_like(s, dtype=compute if is_float(s) else s.dtype) for s in states])
        given = {
            argument.name: None if self.starts[argument.name] is None else value
            for argument, value in zip(self.interface.arguments, zeros, strict=False)
            if argument.name in self.starts
        }
        with attributes_kept(self.fresh, self.interface.changing), self._floats(compute):
            result, memory = self.interface.first(self.fresh, dict(zip(self.names, inputs, strict=True)), given)
        return self._results(result, memory, states, compute)

    def _floats(self, compute: torch.dtype) -> AbstractContextManager[object]:
        return Floats(compute) if self._converts or compute != torch.float16 else contextlib.nullcontext()

    def _results(
        self, result: Any, memory: Sequence[Any], states: Sequence[Tensor], compute: torch.dtype
    ) -> tuple[Tensor, ...]:
        new = [flatten(value)[0] for value in memory]
        lifted = []
        for state, wide in zip(self.tensors, states, strict=True):
            tensor = new[state.place][state.leaf]
            lifted.append((tensor.reshape(1) if state.is_scalar else tensor).to(wide.dtype))
        outputs = [each.to(compute) if is_float(each) else each for each in self.interface.outputs(result)]
        return (*outputs, *lifted)

    def _place(self, state: StateTensor) -> object:
        return self.interface.places[state.place]

    def _memory(self, states: Sequence[Tensor]) -> list[Any]:
        trees = [(list(leaves), spec) for leaves, spec in self.trees]
        for state, tensor in zip(self.tensors, states, strict=True):
            trees[state.place][0][state.leaf] = tensor
        return [spec.unflatten(leaves) for leaves, spec in trees]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> LiftedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in filter(None, (self.module, self.fresh)):
            cast_attributes(module, fn)
        return self


def _along(mask: Tensor, rank: int, axis: int | None) -> Tensor:
    """A mask of the rows of a batch, to select from a tensor with that batch axis."""
    return mask.reshape([-1 if place == axis else 1 for place in range(rank)])
