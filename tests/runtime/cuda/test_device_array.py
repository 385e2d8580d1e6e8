"""Arrays by DLPack: our capsules read by numpy and torch, and theirs by us."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stepcell.runtime.cuda import dlpack_capsule, is_on_device
from stepcell.runtime.cuda.dlpack_capsule import from_capsule, to_capsule

CPU = (1, 0)


class Ours:
    """An array on the host that is exported by our capsule."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU

    def __dlpack__(self, **_: Any) -> Any:
        return to_capsule(self.array.ctypes.data, self.array.shape, self.array.dtype, CPU, self)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint8", "bool"])
def test_numpy_and_torch_read_our_capsules_in_place(dtype: str) -> None:
    array = (np.arange(24) % 2).reshape(2, 3, 4).astype(dtype)
    read, tensor = np.from_dlpack(Ours(array)), torch.from_dlpack(Ours(array))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(read, array)
    assert (read.dtype, read.ctypes.data) == (array.dtype, array.ctypes.data)
    assert tensor.data_ptr() == array.ctypes.data
    assert len(dlpack_capsule._exported) == 2, "both are exported"
    assert from_capsule(tensor.__dlpack__())[:3] == (array.ctypes.data, array.shape, array.dtype)
    del read, tensor
    gc.collect()
    assert not dlpack_capsule._exported, "both have been deleted"


def test_a_capsule_that_is_not_consumed_is_deleted() -> None:
    capsule = Ours(np.zeros(3)).__dlpack__()
    assert len(dlpack_capsule._exported) == 1
    del capsule
    assert not dlpack_capsule._exported


def test_strides_and_offsets_of_others() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    part = tensor[:, 1:].transpose(1, 2)
    address, shape, dtype, strides, device = from_capsule(part.__dlpack__())
    assert (address, shape, dtype, device) == (part.data_ptr(), (2, 4, 2), np.float32, CPU)
    assert strides == (48, 4, 16)


def test_elements_without_a_dtype_of_numpy_are_refused() -> None:
    with pytest.raises(ValueError, match="elements of DLPack type 4 with 16 bits"):
        from_capsule(torch.zeros(3, dtype=torch.bfloat16).__dlpack__())
    with pytest.raises(ValueError, match=r"incorrect name|invalid PyCapsule|PyCapsule"):
        from_capsule(object())


def test_arrays_on_the_host_are_not_on_the_device() -> None:
    for value in (np.zeros(2), torch.zeros(2), torch.zeros(2, device="meta"), [1.0, 2.0], 3):
        assert not is_on_device(value)
