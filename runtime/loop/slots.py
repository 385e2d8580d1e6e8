"""Slots: streams that come and go as rows of one batch.

What a slot is given and gives back has a batch of one, as with a loop of its own; here is where
the rows of the batch are packed and taken apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.dims import Dim
from stepcell.errors import InputError, StateError, UsageError

__all__ = ["Slot", "SlotTable"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Slot:
    """One stream's place in the batch, from `StepLoop.attach` until `StepLoop.detach`.

    It is good for that time only: a stream that comes later gets a slot of its own, also in the
    same row, so that what is left of an old one cannot write into its memory.

    Attributes:
        index: row of the batch.
        name: for messages, reports and snapshots; unique among the attached ones.
    """

    index: int
    name: str


class SlotTable:
    """Who has which row.

    Args:
        contract: of a model whose inputs, outputs and states all count streams on one axis.
        count: rows of the batch.

    Raises:
        UsageError: `count` is below one or not what a model of a fixed batch has, or something in
            the model does not count streams.
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
        self._inputs = {spec.name: _axis(spec, dim) for spec in contract.inputs}
        self._outputs = {spec.name: _axis(spec, dim) for spec in contract.outputs}
        self._attached: dict[str, Slot] = {}
        self._frame_shapes: dict[str, tuple[int, ...]] = {}  # what the staging arrays are made for
        self._staging: dict[str, NDArray[Any]] = {}
        self._rows: dict[str, list[NDArray[Any]]] = {}  # views of them
        self._filled: set[int] = set()  # rows that are not zero

    @property
    def attached(self) -> dict[str, Slot]:
        """The slots in use, by name."""
        return dict(self._attached)

    def attach(self, name: str | None = None) -> Slot:
        """The lowest free row; its number is its name unless told otherwise.

        Raises:
            StateError: none is free, or the name is taken.
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
        """Raises StateError where the slot is not attached."""
        self.require([slot])
        del self._attached[slot.name]

    def replace(self, rows: Mapping[str, int]) -> None:
        """Attach exactly these, by name; a slot that is there in its row already stays as it is."""
        self._attached = {
            name: held if (held := self._attached.get(name)) and held.index == row else Slot(row, name)
            for name, row in rows.items()
        }

    def require(self, slots: Iterable[Slot]) -> None:
        """Raise StateError where one of these is not attached."""
        for slot in slots:
            if not isinstance(slot, Slot) or self._attached.get(slot.name) is not slot:
                name = slot.name if isinstance(slot, Slot) else slot
                raise StateError(
                    f"slots: {name!r} is not attached; attached: {', '.join(self._attached) or 'none'}",
                    hint="a slot is what attach() returns, and good until detach()",
                )

    def mask(self, slots: Collection[Slot]) -> list[bool]:
        """For each row whether it is one of these."""
        rows = {slot.index for slot in slots}
        return [row in rows for row in range(self.count)]

    def idle(self, stepping: Collection[Slot]) -> list[int]:
        """Rows in use that are none of these."""
        return [slot.index for slot in self._attached.values() if slot not in stepping]

    def pack(self, frames: Mapping[Slot, Arrays]) -> dict[str, NDArray[Any]]:
        """The batch: each frame in its slot's row, zeros in the others. Made once and written again.

        Raises:
            InputError: a frame is not of one stream, or two slots differ in size.
        """
        first, arrays = next(iter(frames.items()))
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._frame_shapes:
            self._allocate(first, arrays)
        now = set()
        for slot, arrays in frames.items():
            now.add(slot.index)
            for name, array in arrays.items():
                if array.shape != shapes[name]:
                    raise InputError(
                        f"slot {slot.name}: {name}: got {array.shape}, slot {first.name} {shapes[name]}",
                        hint="all slots of a loop have one size; open another loop for another size",
                    )
                self._rows[name][slot.index][...] = array
        for row in self._filled - now:
            for rows in self._rows.values():
                rows[row][...] = 0
        self._filled = now
        return self._staging

    def _allocate(self, slot: Slot, arrays: Arrays) -> None:
        staging, rows = {}, {}
        for name, array in arrays.items():
            axis = self._inputs[name]
            if array.ndim <= axis or array.shape[axis] != 1:
                raise InputError(
                    f"slot {slot.name}: {name}: expected one stream, of size 1 on axis {axis}, got {array.shape}"
                )
            staging[name] = np.zeros((*array.shape[:axis], self.count, *array.shape[axis + 1 :]), array.dtype)
            rows[name] = [_row(staging[name], axis, row) for row in range(self.count)]
        self._staging, self._rows, self._filled = staging, rows, set()
        self._frame_shapes = {name: array.shape for name, array in arrays.items()}

    def unpack(self, outputs: Arrays, slots: Iterable[Slot]) -> dict[Slot, dict[str, NDArray[Any]]]:
        """Each slot's outputs, with a batch of one; parts of `outputs`, not copies."""
        return {
            slot: {name: _row(outputs[name], axis, slot.index) for name, axis in self._outputs.items()}
            for slot in slots
        }


def _row(array: NDArray[Any], axis: int, row: int) -> NDArray[Any]:
    """One row of an axis, as a view in which the axis has size 1."""
    return array[(slice(None),) * axis + (slice(row, row + 1),)]


def _batch_dim(contract: StepContract) -> Dim:
    """What counts streams: a symbol, or a number where the batch is fixed."""
    dims = {state.shape[state.batch_axis] for state in contract.states}
    dims = dims or {contract.inputs[0].shape[0]} if contract.inputs else dims
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None or not (isinstance(dim, int) or dim.isidentifier()):
        names = ", ".join(f"{state.name} {state.shape}" for state in contract.states)
        raise UsageError(
            f"slots: the states do not count streams alike on their batch axes: {names}",
            hint="give each stream a loop of its own: StepLoop.open(...) without slots",
        )
    return dim


def _axis(spec: Spec, dim: Dim) -> int:
    if dim not in spec.shape:
        raise UsageError(
            f"slots: {spec.name} {spec.shape} has no axis {dim!r} that counts streams",
            hint="give each stream a loop of its own: StepLoop.open(...) without slots",
        )
    return spec.shape.index(dim)
