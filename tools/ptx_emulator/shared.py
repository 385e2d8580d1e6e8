"""Shared memory of one program, with the accesses since the last barrier.

Rules: another warp may read a byte only after a barrier, another thread of the same warp only after a barrier of the
warp. A warp may overwrite a byte that another warp has read only after a barrier. The target of a copy in flight may
be neither read nor written until the copy has been waited for; then it counts as just written by the thread that
started the copy. Memory that a tensor core reads in the background may not be written until the product has been
waited for; then it counts as just read by every warp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.program import Fault

__all__ = ["BASE", "Shared"]

BASE = 1024  # address of its first byte; swizzled layouts need a multiple of 1024
_UNKNOWN, _VALID, _IN_FLIGHT = 0, 1, 2

Bytes = NDArray[np.uint8]
Threads = NDArray[np.int64]


@dataclass
class _Copy:
    offsets: NDArray[np.int64]  # (n, size), of bytes
    values: Bytes
    threads: Threads


class Shared:
    """Bytes; writers and readers are tracked in units of two bytes."""

    def __init__(self, nbytes: int) -> None:
        self._data = np.zeros(nbytes, np.uint8)
        units = -(-nbytes // 2)
        self._state = np.full(units, _UNKNOWN, np.uint8)
        self._thread = np.full(units, -1, np.int16)  # that wrote since its warp last met
        self._warp = np.full(units, -1, np.int8)  # that wrote since the last barrier
        self._readers = np.zeros(units, np.uint16)  # warps that read since the last barrier, a bit each
        self._background = np.full(units, -1, np.int32)  # last group of products that reads it
        self._open: list[_Copy] = []
        self._groups: list[list[_Copy]] = []

    def barrier(self) -> None:
        self._thread[:] = self._warp[:] = -1
        self._readers[:] = 0

    def warp_barrier(self) -> None:
        self._thread[:] = -1

    def read(self, addresses: NDArray[np.int64], size: int, threads: Threads) -> Bytes:
        """Read (n, size) bytes."""
        offsets = self._offsets(addresses, size)
        units = offsets[:, ::2] // 2
        self._check_known(units)
        writer, warp, own = self._thread[units], self._warp[units], (threads // 32)[:, None]
        if ((warp >= 0) & (warp != own)).any():
            raise Fault("reads shared memory that another warp wrote, with no barrier between")
        if ((writer >= 0) & (writer != threads[:, None])).any():
            raise Fault("reads shared memory that another thread of the warp wrote, with no barrier between")
        for each in np.unique(threads // 32).tolist():
            self._readers[units[threads // 32 == each]] |= np.uint16(1 << each)
        return self._data[offsets]

    def write(self, addresses: NDArray[np.int64], values: Bytes, threads: Threads) -> None:
        offsets = self._offsets(addresses, values.shape[1])
        self._claim(offsets[:, ::2] // 2, threads)
        self._put(_Copy(offsets, values, threads))

    def copy(self, addresses: NDArray[np.int64], values: Bytes, threads: Threads) -> None:
        """Start a copy, which completes when its group has been waited for."""
        offsets = self._offsets(addresses, values.shape[1])
        units = offsets[:, ::2] // 2
        self._claim(units, threads)
        self._state[units] = _IN_FLIGHT
        self._open.append(_Copy(offsets, values, threads))

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, left: int) -> None:
        """Complete all groups except the last `left`."""
        done, self._groups = self._groups[: len(self._groups) - left], self._groups[len(self._groups) - left :]
        for copy in (copy for group in done for copy in group):
            self._put(copy)

    def read_in_background(self, addresses: NDArray[np.int64], group: int) -> NDArray[np.uint16]:
        """Read two bytes at each address for a tensor core, which keeps reading until its group is complete."""
        offsets = self._offsets(addresses.ravel(), 2)
        units = offsets[:, 0] // 2
        self._check_known(units)
        if (self._warp[units] >= 0).any():
            raise Fault("a tensor core reads shared memory that was written with no barrier since")
        self._background[units] = group
        return self._data.view(np.uint16)[units].reshape(addresses.shape)

    def background_done(self, first: int, *, everyone: bool) -> None:
        """Complete groups of products before `first`, for all warps or only for the one that waited."""
        done = (self._background >= 0) & (self._background < first)
        if not everyone:
            self._readers[done] = 0xFFFF  # warps that have yet to come there may still read
        self._background[done] = -1

    @property
    def idle(self) -> bool:
        """Whether no copy is in flight."""
        return not any(self._groups) and not self._open

    def _offsets(self, addresses: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        offsets = addresses - BASE
        if ((offsets < 0) | (offsets + size > len(self._data))).any():
            raise Fault(f"shared memory: offset {offsets.max()} with {size} bytes, has {len(self._data)}")
        if (addresses % size).any():
            raise Fault(f"shared memory: an offset is no multiple of {size}")
        found: NDArray[np.int64] = offsets[:, None] + np.arange(size)
        return found

    def _check_known(self, units: NDArray[np.int64]) -> None:
        state = self._state[units]
        if (state == _IN_FLIGHT).any():
            raise Fault("reads shared memory to which a copy is in flight")
        if (state == _UNKNOWN).any():
            raise Fault("reads shared memory that was never written")

    def _claim(self, units: NDArray[np.int64], threads: Threads) -> None:
        """Check that these threads may write."""
        own = (threads // 32)[:, None]
        if (self._readers[units] & ~(1 << own)).any():
            raise Fault("writes shared memory that another warp reads, with no barrier between")
        warp = self._warp[units]
        if ((warp >= 0) & (warp != own)).any():
            raise Fault("writes shared memory that another warp wrote, with no barrier between")
        if (self._state[units] == _IN_FLIGHT).any():
            raise Fault("writes shared memory to which a copy is in flight")
        if (self._background[units] >= 0).any():
            raise Fault("writes shared memory that a tensor core is reading")

    def _put(self, copy: _Copy) -> None:
        units = copy.offsets[:, ::2] // 2
        self._data[copy.offsets] = copy.values
        self._state[units] = _VALID
        self._thread[units] = copy.threads[:, None]
        self._warp[units] = (copy.threads // 32)[:, None]
