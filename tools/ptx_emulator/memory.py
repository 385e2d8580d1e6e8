"""Global memory: named buffers of the host; every other address is a fault."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.program import Fault

__all__ = ["Memory", "Region"]

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.uint64]


@dataclass
class Region:
    """One buffer.

    Attributes:
        writers: number of the program that wrote each pair of bytes in this launch; 0: none.
        shared: programs of a launch may read what others of the same launch wrote, after an atomic.
    """

    name: str
    address: int
    data: Bytes
    shared: bool = False
    writers: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.writers = np.zeros(-(-len(self.data) // 2), np.int32)


class Memory:
    """All buffers of a launch. Addresses are real addresses of the host."""

    def __init__(self) -> None:
        self._regions: list[Region] = []

    def add(self, name: str, address: int, nbytes: int, *, shared: bool = False) -> None:
        """Add a buffer; replaces those that it overlaps."""
        keep: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        self._regions = [
            r for r in self._regions if r.address + len(r.data) <= address or address + nbytes <= r.address
        ]
        bisect.insort(self._regions, Region(name, address, np.frombuffer(keep, np.uint8), shared), key=_address)

    def start_launch(self) -> None:
        """Forget who wrote what in earlier launches."""
        for region in self._regions:
            region.writers[:] = 0

    def read(self, addresses: Addresses, size: int, program: int, *, acquired: bool) -> Bytes:
        """(n, size) bytes at n addresses.

        Args:
            program: number of the reading program, from 1.
            acquired: the program has executed an atomic and a barrier.

        Raises:
            Fault: outside all buffers, unaligned, or written by another program of this launch.
        """
        result = np.empty((len(addresses), size), np.uint8)
        for region, rows, index in self._split(addresses, size):
            writers = region.writers[index[:, ::2] // 2]
            others = (writers != 0) & (writers != program)
            if others.any() and not (region.shared and acquired):
                raise Fault(
                    f"reads {region.name} at byte {index[others.nonzero()[0][0], 0]}, which another program wrote"
                )
            result[rows] = region.data[index]
        return result

    def write(self, addresses: Addresses, values: Bytes, program: int) -> None:
        """Write (n, size) bytes at n addresses.

        Raises:
            Fault: outside all buffers, unaligned, or written by two programs.
        """
        for region, rows, index in self._split(addresses, values.shape[1]):
            places = index[:, ::2] // 2
            writers = region.writers[places]
            if ((writers != 0) & (writers != program)).any() and not region.shared:
                raise Fault(f"writes {region.name} where another program wrote")
            region.writers[places] = program
            region.data[index] = values[rows]

    def _split(self, addresses: Addresses, size: int) -> list[tuple[Region, Any, NDArray[np.int64]]]:
        """Split by region: region, rows of `addresses` inside it, and (rows, size) offsets of their bytes."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"address {int(addresses[addresses % np.uint64(size) != 0][0]):#x} is no multiple of {size}")
        starts = np.array([r.address for r in self._regions], np.uint64)
        which = np.searchsorted(starts, addresses, "right").astype(np.int64) - 1
        found = []
        for number in np.unique(which).tolist():
            rows = (which == number).nonzero()[0]
            region = self._regions[max(number, 0)]
            offsets = addresses[rows].astype(np.int64) - region.address
            outside = (offsets < 0) | (offsets + size > len(region.data))
            if outside.any():
                raise Fault(
                    f"{size} bytes at byte {offsets[outside][0]} of {region.name}, which has {len(region.data)}"
                )
            found.append((region, rows, offsets[:, None] + np.arange(size)))
        return found


def _address(region: Region) -> int:
    return region.address
