"""CUDA memory: device buffers, pinned host arrays, and copies between them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stepcell.errors import DeviceError
from stepcell.files import human_size
from stepcell.runtime.cuda.bindings import check, driver, initialised_driver
from stepcell.runtime.cuda.streams import Stream

__all__ = [
    "DeviceBuffer",
    "PinnedArray",
    "Rows",
    "clear_row",
    "copy_on_device",
    "copy_row",
    "copy_to_device",
    "copy_to_host",
    "device_of",
]


class DeviceBuffer:
    """Memory on the current device."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = _address(driver().cuMemAlloc(nbytes), nbytes, "GPU memory")

    def clear(self, stream: Stream) -> None:
        """Queue a fill with zeros."""
        check(driver().cuMemsetD8Async(self.address, 0, self.nbytes, stream.handle))

    def close(self) -> None:
        address, self.address = self.address, 0
        if address:
            check(driver().cuMemFree(address))


class PinnedArray:
    """An array in page-locked host memory, which copies to and from the device need to be asynchronous."""

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        self.nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.address = _address(driver().cuMemHostAlloc(self.nbytes, 0), self.nbytes, "pinned host memory")
        memory: Any = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        self.array: NDArray[Any] = np.frombuffer(memory, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory. `array` must not be used afterwards."""
        address, self.address = self.address, 0
        if address:
            check(driver().cuMemFreeHost(address))


def _address(result: Sequence[Any], nbytes: int, kind: str) -> int:
    try:
        return int(check(result))
    except DeviceError as error:
        raise DeviceError(f"{error.message} (asked for {human_size(nbytes)} of {kind})", hint=error.hint) from error


@dataclass(frozen=True)
class Rows:
    """One axis of a C-contiguous array on the device, for copying or clearing single indices of it.

    Attributes:
        address: address of the array.
        outer: product of the sizes before the axis.
        count: size of the axis.
        inner: bytes of one index of the axis within one of `outer`.
    """

    address: int
    outer: int
    count: int
    inner: int

    @classmethod
    def of(cls, address: int, shape: Sequence[int], axis: int, itemsize: int) -> Rows:
        """From the shape of an array, the bytes of an element and the number of the axis."""
        return cls(address, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]) * itemsize)

    def parts(self, index: int) -> range:
        """Address of each contiguous part of one index, `inner` bytes long."""
        pitch, start = self.count * self.inner, self.address + index * self.inner
        return range(start, start + self.outer * pitch, pitch)


def clear_row(rows: Rows, index: int, stream: Stream) -> None:
    """Queue a fill of one index with zeros."""
    for part in rows.parts(index):
        check(driver().cuMemsetD8Async(part, 0, rows.inner, stream.handle))


def copy_row(target: Rows, index: int, source: Rows, source_index: int, stream: Stream) -> None:
    """Queue a copy of one index of `source` on the device. The arrays may differ in the size of the axis only.

    Copies part by part: there is one part where the axis is the first one, and the driver guarantees copies with a
    pitch only for memory that it padded itself.
    """
    assert (target.outer, target.inner) == (source.outer, source.inner), (target, source)
    for part, source_part in zip(target.parts(index), source.parts(source_index), strict=True):
        copy_on_device(part, source_part, target.inner, stream)


def copy_to_device(buffer: DeviceBuffer, array: NDArray[Any] | PinnedArray, stream: Stream) -> None:
    """Queue a copy from the host. `array` must be C-contiguous and live until the copy is done."""
    check(driver().cuMemcpyHtoDAsync(buffer.address, _host(array, buffer), buffer.nbytes, stream.handle))


def copy_to_host(array: NDArray[Any] | PinnedArray, buffer: DeviceBuffer, stream: Stream) -> None:
    """Queue a copy to the host. `array` must be C-contiguous; it is filled once the stream is done."""
    check(driver().cuMemcpyDtoHAsync(_host(array, buffer), buffer.address, buffer.nbytes, stream.handle))


def copy_on_device(target: int, source: int, nbytes: int, stream: Stream) -> None:
    """Queue a copy from one address on the device to another."""
    check(driver().cuMemcpyDtoDAsync(target, source, nbytes, stream.handle))


def device_of(address: int) -> int | None:
    """Number of the device that an address belongs to; None: host memory."""
    module = initialised_driver()
    names = module.CUpointer_attribute
    status, kind = module.cuPointerGetAttribute(names.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
    if status == module.CUresult.CUDA_ERROR_INVALID_VALUE:  # ordinary host memory, which CUDA does not know
        return None
    check((status,))
    managed = check(module.cuPointerGetAttribute(names.CU_POINTER_ATTRIBUTE_IS_MANAGED, address))
    if kind != module.CUmemorytype.CU_MEMORYTYPE_DEVICE and not managed:
        return None
    return int(check(module.cuPointerGetAttribute(names.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)))


def _host(array: NDArray[Any] | PinnedArray, buffer: DeviceBuffer) -> int:
    """Address of an array that is as large as the buffer."""
    assert array.nbytes == buffer.nbytes, (array.nbytes, buffer.nbytes)
    if isinstance(array, PinnedArray):  # a step copies from and to these; numpy takes 1 us for the address
        return array.address
    assert array.flags.c_contiguous, array.strides
    return int(array.ctypes.data)
