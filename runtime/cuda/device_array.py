"""Arrays on a GPU, exchanged by address through DLPack or `__cuda_array_interface__`.

CUDA array interface, version 3: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
DLPack: https://data-apis.org/array-api/latest/design_topics/data_interchange.html
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stepcell.contract import TensorSpec
from stepcell.errors import InputError
from stepcell.runtime.cuda.devices import ensure_device
from stepcell.runtime.cuda.dlpack_capsule import CUDA_DEVICES, from_capsule, to_capsule
from stepcell.runtime.cuda.memory import device_of
from stepcell.runtime.cuda.streams import DEFAULT_STREAM, Event, wait_on

__all__ = ["DeviceArray", "OnDevice", "is_on_device", "read_device_array"]


class OnDevice(Protocol):
    """An array that may be on a GPU: from PyTorch, CuPy, JAX or Numba, or a `DeviceArray`."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array in the memory of a GPU, readable by DLPack or `__cuda_array_interface__`.

    Attributes:
        address: address of the first element.
        shape, dtype: as in numpy.
        device: CUDA number of the GPU.
        stream: handle of the stream on which its contents are computed; None: they are complete.
        ready: event recorded behind the work that fills it; None: nothing to wait for.
        owner: object that keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    stream: int | None = None
    ready: Event | None = None
    owner: Any = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3. The consumer has to wait for `stream` (CuPy and Numba do, `torch.as_tensor` does not)."""
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack device type (CUDA) and device number."""
        return CUDA_DEVICES[0], self.device

    def __dlpack__(self, *, stream: int | None = None, copy: bool | None = None, **_: Any) -> Any:
        """A DLPack capsule of this memory.

        Args:
            stream: handle of the consumer's stream, which is made to wait for the contents; None: the default
                stream; -1: no stream waits.

        Raises:
            BufferError: `copy` is true; the memory is only shared.
        """
        if copy:
            raise BufferError("this array shares its memory and cannot be exported as a copy")
        if self.ready is not None and stream != -1:
            ensure_device(self.device)
            wait_on(stream or DEFAULT_STREAM, self.ready)
        return to_capsule(self.address, self.shape, self.dtype, self.__dlpack_device__(), self)


def is_on_device(value: Any) -> bool:
    """Whether `value` is an array in the memory of a GPU."""
    if hasattr(value, "__dlpack_device__"):
        try:
            return bool(value.__dlpack_device__()[0] in CUDA_DEVICES)
        except (TypeError, ValueError, RuntimeError, BufferError):  # a device type that DLPack does not know
            return False
    return hasattr(value, "__cuda_array_interface__")


def read_device_array(spec: TensorSpec, value: Any, *, stream: int, device: int) -> DeviceArray:
    """`value` as a `DeviceArray` of the same memory.

    Args:
        spec: the input it is for.
        stream: handle of the stream that will read it; a producer that follows DLPack makes it wait for the contents.
        device: CUDA number of the GPU it must be on.

    Raises:
        InputError: another device or dtype, or not C-contiguous; nothing is converted on a GPU.
    """
    try:
        if hasattr(value, "__dlpack__"):
            capsule = value.__dlpack__(stream=stream)
            address, shape, dtype, strides, (_, where) = from_capsule(capsule)
            # The capsule keeps the memory alive: held until the step has read it.
            array = DeviceArray(address, shape, dtype, where, owner=(value, capsule))
        else:
            interface = value.__cuda_array_interface__
            address, shape, dtype = interface["data"][0], tuple(interface["shape"]), np.dtype(interface["typestr"])
            strides, there = interface.get("strides"), device_of(address)
            if there is None or interface.get("mask") is not None:
                raise ValueError("is masked or on the host")
            array = DeviceArray(address, shape, dtype, there, stream=interface.get("stream"), owner=value)
    except (TypeError, ValueError, KeyError, RuntimeError, BufferError) as error:
        raise InputError(
            f"{spec.name}: expected an array on cuda:{device}, got {type(value).__name__}: {error}",
            hint="a tensor with gradients is detached first: x.detach()",
        ) from error
    if array.device != device:
        raise InputError(f"{spec.name}: expected an array on cuda:{device}, got one on cuda:{array.device}")
    if array.dtype != np.dtype(spec.dtype):
        raise InputError(
            f"{spec.name}: expected {spec.dtype}, got {array.dtype}; on the GPU nothing is converted",
            hint=f"scale and convert it there first, such as by x.to(torch.{spec.dtype})",
        )
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise InputError(f"{spec.name}: expected a C-contiguous array, got strides {strides}", hint="x.contiguous()")
    return array


def _is_contiguous(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    expected = (itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return 0 in shape or all(
        size == 1 or stride == right for size, stride, right in zip(shape, strides, expected, strict=True)
    )
