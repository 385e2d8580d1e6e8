"""DLPack capsules: reading and writing the C structures of dlpack.h.

The layout is the one before version 1.0 (https://dmlc.github.io/dlpack/latest/c_api.html), which every library uses
unless the consumer asks for a newer one.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

__all__ = ["CUDA_DEVICES", "from_capsule", "to_capsule"]

CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_NAME = b"dltensor"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode by the kind of a numpy dtype


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
# A capsule that is being destroyed has no references, so it is passed by address.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_exported: dict[int, Any] = {}  # objects that exported capsules refer to, by address of the structure


def from_capsule(
    capsule: Any,
) -> tuple[int, tuple[int, ...], np.dtype[Any], tuple[int, ...] | None, tuple[int, int]]:
    """Address, shape, dtype, strides in bytes (None: C order) and device of a capsule, which is not consumed.

    Raises:
        ValueError: it is not the capsule of a tensor, or numpy has no dtype for the elements.
    """
    tensor = _ManagedTensor.from_address(_pointer(capsule, _NAME)).tensor
    kind = next((kind for kind, code in _KINDS.items() if code == tensor.code), None)
    if kind is None or tensor.lanes != 1 or tensor.bits % 8:
        raise ValueError(f"elements of DLPack type {tensor.code} with {tensor.bits} bits and {tensor.lanes} lanes")
    dtype = np.dtype(f"{kind}{tensor.bits // 8}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(dtype.itemsize * step for step in tensor.strides[: tensor.ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return address, shape, dtype, strides, (tensor.device_type, tensor.device_id)


def to_capsule(address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: Any) -> Any:
    """A capsule of C-contiguous memory; keeps `owner` alive until the consumer has deleted it."""
    managed, sizes = _ManagedTensor(), (ctypes.c_int64 * len(shape))(*shape)
    tensor = managed.tensor
    tensor.data, (tensor.device_type, tensor.device_id) = address, device
    tensor.ndim, tensor.shape = len(shape), sizes
    tensor.code, tensor.bits, tensor.lanes = _KINDS[dtype.kind], 8 * dtype.itemsize, 1
    managed.deleter = ctypes.cast(_delete, ctypes.c_void_p).value
    key = ctypes.addressof(managed)
    _exported[key] = (managed, sizes, owner)
    return _new(key, _NAME, ctypes.cast(_destroy, ctypes.c_void_p).value)


def _delete_tensor(managed: int) -> None:
    """Deleter of the structure: called by the consumer."""
    _exported.pop(managed, None)


def _destroy_capsule(capsule: int) -> None:
    """Destructor of the capsule: called by Python. A consumed capsule has been renamed by then."""
    if _is_valid(capsule, _NAME):
        _exported.pop(_pointer_at(capsule, _NAME), None)


_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_delete, _destroy = _callback(_delete_tensor), _callback(_destroy_capsule)
