"""Slots: rows of one batch that are assigned to streams, and packing of their frames into the batch.

Inputs and outputs of a slot have batch size 1, as in a loop of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.dims import Dim
from stepcell.errors import InputError, StateError, UsageError

__all__ = ["Slot", "SlotTable", "is_shared", "require_streams", "row_of"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Slot:
    """A row of the batch, assigned to a stream from `StepLoop.attach` until `StepLoop.detach`.

    A later stream gets a new `Slot` even for the same row, so a stale `Slot` cannot change its states.

    Attributes:
        index: row of the batch.
        name: for messages, reports and snapshots; unique among the attached slots.
    """

    index: int
    name: str


class SlotTable:
    """Assignment of rows to slots.

    Args:
        contract: contract of a model whose inputs, outputs and states all have the batch axis.
        count: number of rows of the batch.

    Attributes:
        input_axes, output_axes: the axis of streams of each input and output by name; inputs that all share have none.

    Raises:
        UsageError: `count` is below one or differs from the fixed batch size of the model, or an input, output or
            state has no batch axis. An input that has a value in the contract needs none: all slots share it.
    """

    def __init__(self, contract: StepContract, count: int) -> None:
        if count < 1:
            raise UsageError(f"slots: expected a number above zero, got {count}")
        self.count = count
        dim = _batch_dim(contract)
        if isinstance(dim, int) and dim != count:
            raise UsageError(
                f"slots: expected {dim}, the batch this model is fixed at, got {count}",
                hint="export it with --dynamic batch, or with that many rows in --shape",
            )
        self.input_axes = {spec.name: _axis(spec, dim) for spec in contract.inputs if not is_shared(spec)}
        self.output_axes = {spec.name: _axis(spec, dim) for spec in contract.outputs}
        self._attached: dict[str, Slot] = {}
        self._frame_shapes: dict[str, tuple[int, ...]] = {}  # that the batch is allocated for
        self._staging: dict[str, NDArray[Any]] = {}  # the batch, by input
        self._rows: dict[str, list[NDArray[Any]]] = {}  # views of the rows of the batch

    @property
    def attached(self) -> dict[str, Slot]:
        """The attached slots, by name."""
        return dict(self._attached)

    def attach(self, name: str | None = None) -> Slot:
        """Assign the lowest free row; by default its number is its name.

        Raises:
            StateError: no row is free, or the name is taken.
        """
        taken = {slot.index for slot in self._attached.values()}
        index = next((row for row in range(self.count) if row not in taken), None)
        if index is None:
            raise StateError(
                f"slots: all {self.count} are in use: {', '.join(self._attached)}",
                hint="detach one, or open the model with more: StepLoop.open(..., slots=N)",
            )
        slot = Slot(index, str(index) if name is None else name)
        if slot.name in self._attached:
            holder = self._attached[slot.name]
            raise StateError(f"slots: the name {slot.name!r} is taken by the slot in row {holder.index}")
        self._attached[slot.name] = slot
        return slot

    def detach(self, slot: Slot) -> None:
        """Free the row of a slot; raises StateError if it is not attached."""
        self.require([slot])
        del self._attached[slot.name]

    def replace(self, rows: Mapping[str, int]) -> None:
        """Attach exactly these rows, by name. A slot that is attached to its row already stays valid."""
        self._attached = {
            name: held if (held := self._attached.get(name)) and held.index == row else Slot(row, name)
            for name, row in rows.items()
        }

    def require(self, slots: Iterable[Slot]) -> None:
        """Raise StateError unless all of these are attached."""
        for slot in slots:
            if not isinstance(slot, Slot) or self._attached.get(slot.name) is not slot:
                name = slot.name if isinstance(slot, Slot) else slot
                raise StateError(
                    f"slots: {name!r} is not attached; attached: {', '.join(self._attached) or 'none'}",
                    hint="a slot is what attach() returns, and valid until detach()",
                )

    def mask(self, slots: Collection[Slot]) -> list[bool]:
        """One boolean per row: whether it belongs to one of these slots."""
        rows = {slot.index for slot in slots}
        return [row in rows for row in range(self.count)]

    def idle(self, stepping: Collection[Slot], *, vacant: bool = False) -> list[int]:
        """Rows of the attached slots that are not stepping; `vacant`: also the rows that are not attached."""
        if vacant:
            rows = {slot.index for slot in stepping}
            return [row for row in range(self.count) if row not in rows]
        return [slot.index for slot in self._attached.values() if slot not in stepping]

    def pack(self, frames: Mapping[Slot, Arrays]) -> dict[str, NDArray[Any]]:
        """Pack frames into a batch; rows without one keep what they had. The arrays are reused by the next call.

        Raises:
            InputError: the batch size of a frame is not 1, or two slots differ in size.
        """
        first, arrays = next(iter(frames.items()))
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._frame_shapes:
            self._allocate(first, arrays)
        for slot, arrays in frames.items():
            for name, array in arrays.items():
                if name not in self.input_axes:
                    self._share(name, array, slot, first)
                    continue
                if array.shape != shapes[name]:
                    raise InputError(
                        f"slot {slot.name}: {name}: got {array.shape}, slot {first.name} {shapes[name]}",
                        hint="all slots of a loop have one size; open another loop for another size",
                    )
                self._rows[name][slot.index][...] = array
        return self._staging

    def _share(self, name: str, array: NDArray[Any], slot: Slot, first: Slot) -> None:
        """Take the value of an input that all streams share from the first slot, and check that of the others."""
        if slot is first:
            self._staging[name] = array
        elif not np.array_equal(array, self._staging[name]):
            raise InputError(
                f"slot {slot.name}: {name}: all streams share this input, and {first.name} has another value"
            )

    def _allocate(self, slot: Slot, arrays: Arrays) -> None:
        staging, rows = {}, {}
        for name, axis in self.input_axes.items():
            array = arrays[name]
            if array.ndim <= axis or array.shape[axis] != 1:
                raise InputError(f"slot {slot.name}: {name}: expected batch size 1 on axis {axis}, got {array.shape}")
            staging[name] = np.zeros((*array.shape[:axis], self.count, *array.shape[axis + 1 :]), array.dtype)
            rows[name] = [row_of(staging[name], axis, row) for row in range(self.count)]
        self._staging, self._rows = staging, rows
        self._frame_shapes = {name: array.shape for name, array in arrays.items()}

    def unpack(self, outputs: Arrays, slots: Iterable[Slot]) -> dict[Slot, dict[str, NDArray[Any]]]:
        """The outputs of each slot, with batch size 1, as views of `outputs`."""
        return {
            slot: {name: row_of(outputs[name], axis, slot.index) for name, axis in self.output_axes.items()}
            for slot in slots
        }


def row_of(array: NDArray[Any], axis: int, row: int) -> NDArray[Any]:
    """A view of one row, in which the axis has size 1."""
    return array[(slice(None),) * axis + (slice(row, row + 1),)]


def is_shared(spec: TensorSpec) -> bool:
    """Whether all streams share an input: one without an axis of streams, which has a value in the contract."""
    return spec.batch_axis is None and spec.value is not msgspec.UNSET


def require_streams(contract: StepContract) -> None:
    """Raise UsageError where a state has no axis of streams, so that the model steps one stream."""
    if any(state.batch_axis is None for state in contract.states):
        names = ", ".join(f"{state.name} {state.shape}" for state in contract.states)
        raise UsageError(
            f"this model steps one stream: not every state has an axis that counts streams: {names}",
            hint="reset() clears the state; give each stream a loop of its own: StepLoop.open(...) without slots",
        )


def _batch_dim(contract: StepContract) -> Dim:
    """The dimension of the batch axis: a symbol, or a number if the batch is fixed."""
    require_streams(contract)
    dims = {state.streams for state in contract.states}
    dims = dims or {contract.inputs[0].shape[0]} if contract.inputs else dims
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None or not (isinstance(dim, int) or dim.isidentifier()):
        names = ", ".join(f"{state.name} {state.shape}" for state in contract.states)
        raise UsageError(
            f"slots: the states have different dimensions on their batch axes: {names}",
            hint="give each stream a loop of its own: StepLoop.open(...) without slots",
        )
    return dim


def _axis(spec: TensorSpec, dim: Dim) -> int:
    if isinstance(spec.batch_axis, int):
        return spec.batch_axis
    if dim not in spec.shape or spec.batch_axis is None:
        raise UsageError(
            f"slots: {spec.name} {spec.shape} has no batch axis {dim!r}",
            hint="give each stream a loop of its own: StepLoop.open(...) without slots",
        )
    return spec.shape.index(dim)
