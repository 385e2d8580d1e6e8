"""The states of a TensorRT engine: two buffers each on the device, which never leave it unasked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StateSpec
from stepcell.dims import resolve
from stepcell.errors import StateError
from stepcell.runtime import cuda

__all__ = ["DeviceState"]


class DeviceState:
    """A state: `buffers[parity]` is read by the next step, the other one written.

    Args:
        spec: from the contract.
        symbols: its sizes.
        stream: on which everything about it is queued.
        own: for what must be closed.
    """

    def __init__(
        self, spec: StateSpec, symbols: Mapping[str, int], stream: cuda.Stream, own: Callable[[Any], Any]
    ) -> None:
        self.spec = spec
        self.shape = resolve(spec.shape, symbols)
        self._count = self.shape[spec.batch_axis]
        self._itemsize = np.dtype(spec.dtype).itemsize
        self._stream = stream
        nbytes = int(np.prod(self.shape)) * self._itemsize
        self.buffers: tuple[cuda.DeviceBuffer, ...] = tuple(own(cuda.DeviceBuffer(nbytes)) for _ in range(2))
        self._initial: cuda.DeviceBuffer | None = None  # one row of its initial value; None: zeros
        if spec.init != "zeros":
            axis = spec.batch_axis
            row = np.ascontiguousarray(spec.initial((*self.shape[:axis], 1, *self.shape[axis + 1 :])))
            self._initial = own(cuda.DeviceBuffer(row.nbytes))
            cuda.copy_to_device(self._initial, row, stream)
            stream.synchronize()  # the copy reads `row`

    def reset(self, parity: int, slots: Sequence[bool] | None) -> None:
        """Queue: the initial value, in all rows of the batch axis or those that are True."""
        if slots is not None and len(slots) != self._count:
            raise StateError(f"reset: expected {self._count} slots, got {len(slots)}")
        current = self.buffers[parity]
        if slots is None and self._initial is None:
            current.clear(self._stream)
            return
        rows = self._rows(current, self._count)
        for row in range(self._count) if slots is None else np.flatnonzero(slots).tolist():
            if self._initial is None:
                cuda.clear_row(rows, row, self._stream)
            else:
                cuda.copy_row(rows, row, self._rows(self._initial, 1), 0, self._stream)

    def keep(self, parity: int, idle: Sequence[int]) -> None:
        """Queue copies of rows from the buffer that the step reads to the one it writes."""
        old, new = (self._rows(self.buffers[each], self._count) for each in (parity, 1 - parity))
        for row in idle:
            cuda.copy_row(new, row, old, row, self._stream)

    def read(self, parity: int) -> NDArray[Any]:
        """Queue a copy to the host; the array is filled once the stream is done."""
        array = np.empty(self.shape, self.spec.dtype)
        cuda.copy_to_host(array, self.buffers[parity], self._stream)
        return array

    def write(self, parity: int, array: NDArray[Any]) -> None:
        """Queue a copy from the host; `array` is read until the stream is done."""
        cuda.copy_to_device(self.buffers[parity], array, self._stream)

    def _rows(self, buffer: cuda.DeviceBuffer, count: int) -> cuda.Rows:
        axis = self.spec.batch_axis
        shape = (*self.shape[:axis], count, *self.shape[axis + 1 :])
        return cuda.Rows.of(buffer.address, shape, axis, self._itemsize)
