"""Element types of an evaluation: as the file declares them, or with every float widened to one type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import UsageError

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["Arithmetic", "Array", "Widening", "is_float", "is_narrow", "rounded", "widened"]

Array = NDArray[Any]
Arithmetic = Literal["as_written", "float64", "float32"]

_NARROW = ("float16", "bfloat16")  # bfloat16 is a type of ml_dtypes, which onnx brings


def is_narrow(dtype: np.dtype[Any]) -> bool:
    """Whether it is a float of 16 bits."""
    return dtype.name in _NARROW


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether it is a float of any width; numpy does not count bfloat16 among them."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def widened(array: Array) -> Array:
    """A float of 16 bits as float32, exactly; anything else unchanged."""
    return array.astype(np.float32) if is_narrow(array.dtype) else array


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """The array in `dtype`, rounded to nearest, ties to even."""
    return array if array.dtype == dtype else array.astype(dtype)


class Widening:
    """What type a float of the file has in an evaluation.

    Args:
        arithmetic: "as_written": its own; "float64": float64 whatever it is; "float32": float32
            where it has 16 bits, its own otherwise.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        if arithmetic not in get_args(Arithmetic):
            raise UsageError(f"arithmetic: expected {', '.join(get_args(Arithmetic))}, got {arithmetic!r}")
        self._arithmetic = arithmetic

    def dtype(self, element: int) -> np.dtype[Any]:
        """The numpy type for an element type of ONNX (`TensorProto.FLOAT`, ...)."""
        from onnx import helper

        return self.of(np.dtype(helper.tensor_dtype_to_np_dtype(element)))

    def of(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The type in which values of `dtype` are held."""
        if self._arithmetic == "float64" and is_float(dtype):
            return np.dtype(np.float64)
        if self._arithmetic == "float32" and is_narrow(dtype):
            return np.dtype(np.float32)
        return dtype

    def tensor(self, tensor: TensorProto) -> Array:
        """The values of a tensor of the file."""
        from onnx import numpy_helper

        array: Array = numpy_helper.to_array(tensor)
        return rounded(array, self.of(array.dtype))
