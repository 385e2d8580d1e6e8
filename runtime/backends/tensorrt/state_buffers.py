"""State buffers: two buffers in device memory for every state, and for its fp16 mirror."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StateSpec
from stepcell.dims import resolve
from stepcell.errors import StateError
from stepcell.plugins.fp16_mirrors import Fp16Mirror, half_map, half_shape
from stepcell.runtime import cuda

__all__ = ["Own", "StateBuffers"]

Own = Callable[[Any], Any]  # registers a resource to be closed, and returns it


class StateBuffers:
    """The buffers of a state and, where the engine takes one, of its fp16 mirror, which always follows the state.

    Args:
        spec: from the contract.
        mirror: from the sidecar; None: the engine takes no fp16 mirror of this state.
        symbols: value of every symbol in the shape.
        stream: on which all work on the buffers is queued.
        own: registers a resource to be closed, and returns it.
    """

    def __init__(
        self, spec: StateSpec, mirror: Fp16Mirror | None, symbols: Mapping[str, int], stream: cuda.Stream, own: Own
    ) -> None:
        self.spec = spec
        self.shape = resolve(spec.shape, symbols)
        # Without an axis of streams, the whole state is the row of one stream.
        axis = 0 if spec.batch_axis is None else spec.batch_axis
        shape = (1, *self.shape) if spec.batch_axis is None else self.shape
        self._count = shape[axis]
        self._stream = stream
        initial = None
        if spec.init != "zeros":
            one = self.shape if spec.batch_axis is None else (*shape[:axis], 1, *shape[axis + 1 :])
            initial = spec.initial(one).reshape((*shape[:axis], 1, *shape[axis + 1 :]))
        self._state = _BufferPair(spec.input, spec.output, shape, spec.dtype, axis, initial, stream, own)
        self._mirror: _BufferPair | None = None
        if mirror is not None:
            row = None if initial is None else half_map(initial)
            self._mirror = _BufferPair(
                mirror.input, mirror.output, half_shape(self.shape), "float16", 0, row, stream, own
            )
        self._pairs = [pair for pair in (self._state, self._mirror) if pair is not None]

    def bindings(self, parity: int) -> Iterator[tuple[str, cuda.DeviceBuffer]]:
        """Name of each engine tensor with the buffer that a step of this parity reads or writes."""
        for pair in self._pairs:
            yield pair.input, pair.buffers[parity]
            yield pair.output, pair.buffers[1 - parity]

    def reset(self, parity: int, rows: Sequence[bool] | None) -> None:
        """Queue a write of the initial value to the rows of the batch axis that are True; None: to all rows."""
        if rows is not None and len(rows) != self._count:
            raise StateError(f"reset: expected {self._count} rows, got {len(rows)}")
        for pair in self._pairs:
            pair.reset(parity, None if rows is None else np.flatnonzero(rows).tolist())

    def keep(self, parity: int, idle: Sequence[int]) -> None:
        """Queue copies of idle rows from the buffer that the step reads to the one that it writes."""
        for pair in self._pairs:
            pair.keep(parity, idle)

    def read(self, parity: int) -> NDArray[Any]:
        """Queue a copy to the host. The array is filled once the stream is done."""
        array = np.empty(self.shape, self.spec.dtype)
        cuda.copy_to_host(array, self._state.buffers[parity], self._stream)
        return array

    def write(self, parity: int, array: NDArray[Any]) -> None:
        """Copy from the host, and wait for the copy."""
        state = np.ascontiguousarray(array)
        cuda.copy_to_device(self._state.buffers[parity], state, self._stream)
        if self._mirror is not None:
            half = half_map(state)
            cuda.copy_to_device(self._mirror.buffers[parity], half, self._stream)
        self._stream.synchronize()  # the copies read the arrays

    def read_row(self, parity: int, row: int) -> NDArray[Any]:
        """Copy one row of the batch axis to the host, and wait for the copy."""
        axis = self.spec.batch_axis or 0
        array = np.empty((*self.shape[:axis], 1, *self.shape[axis + 1 :]), self.spec.dtype)
        self._state.read_row(parity, row, array)
        return array

    def write_row(self, parity: int, row: int, array: NDArray[Any]) -> None:
        """Copy one row of the batch axis from the host, and wait for the copy."""
        self._state.write_row(parity, row, array)
        if self._mirror is not None:
            self._mirror.write_row(parity, row, half_map(np.ascontiguousarray(array)))


class _BufferPair:
    """Two buffers for an input and an output of the engine: a step reads `buffers[parity]` and writes the other one.

    Args:
        input, output: names of the engine's tensors.
        shape, dtype: as in memory.
        axis: the batch axis.
        initial: value of one row before the first step; None: zeros.
    """

    def __init__(
        self,
        input: str,
        output: str,
        shape: Sequence[int],
        dtype: str,
        axis: int,
        initial: NDArray[Any] | None,
        stream: cuda.Stream,
        own: Own,
    ) -> None:
        self.input, self.output = input, output
        self._shape, self._axis, self._itemsize, self._stream = tuple(shape), axis, np.dtype(dtype).itemsize, stream
        nbytes = math.prod(shape) * self._itemsize
        self.buffers: tuple[cuda.DeviceBuffer, ...] = tuple(own(cuda.DeviceBuffer(nbytes)) for _ in range(2))
        self._initial: cuda.Rows | None = None
        if initial is not None:
            row = np.ascontiguousarray(initial)
            buffer = own(cuda.DeviceBuffer(row.nbytes))
            cuda.copy_to_device(buffer, row, stream)
            stream.synchronize()  # the copy reads `row`
            self._initial = cuda.Rows.of(buffer.address, row.shape, axis, self._itemsize)

    def reset(self, parity: int, indices: Sequence[int] | None) -> None:
        """Queue a write of the initial value to these rows; None: to all rows."""
        if indices is None and self._initial is None:
            self.buffers[parity].clear(self._stream)
            return
        rows = self._rows(self.buffers[parity])
        for row in range(rows.count) if indices is None else indices:
            if self._initial is None:
                cuda.clear_row(rows, row, self._stream)
            else:
                cuda.copy_row(rows, row, self._initial, 0, self._stream)

    def keep(self, parity: int, idle: Sequence[int]) -> None:
        """Queue copies of idle rows from the buffer that the step reads to the one that it writes."""
        old, new = (self._rows(self.buffers[each]) for each in (parity, 1 - parity))
        for row in idle:
            cuda.copy_row(new, row, old, row, self._stream)

    def read_row(self, parity: int, row: int, array: NDArray[Any]) -> None:
        """Copy one row to a C-contiguous array on the host, and wait for the copy."""
        with contextlib.closing(cuda.DeviceBuffer(array.nbytes)) as buffer:
            rows = cuda.Rows.of(buffer.address, array.shape, self._axis, self._itemsize)
            cuda.copy_row(rows, 0, self._rows(self.buffers[parity]), row, self._stream)
            cuda.copy_to_host(array, buffer, self._stream)
            self._stream.synchronize()

    def write_row(self, parity: int, row: int, array: NDArray[Any]) -> None:
        """Copy one row from the host, and wait for the copy."""
        one = np.ascontiguousarray(array)
        with contextlib.closing(cuda.DeviceBuffer(one.nbytes)) as buffer:
            cuda.copy_to_device(buffer, one, self._stream)
            rows = cuda.Rows.of(buffer.address, one.shape, self._axis, self._itemsize)
            cuda.copy_row(self._rows(self.buffers[parity]), row, rows, 0, self._stream)
            self._stream.synchronize()

    def _rows(self, buffer: cuda.DeviceBuffer) -> cuda.Rows:
        return cuda.Rows.of(buffer.address, self._shape, self._axis, self._itemsize)
