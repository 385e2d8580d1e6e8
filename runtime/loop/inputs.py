"""What a caller gives to a step, as an array of the contract's dtype; or why it cannot be one."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.contract import DType, TensorSpec
from stepcell.errors import InputError

__all__ = ["as_input", "require_finite"]

# Elements up to which a sum of squares is quicker than a look at each of them. Above some 10,000 the
# library behind it would use threads, which keep their cores busy between two steps.
_FEW = 8192
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in get_args(DType)}


def as_input(spec: TensorSpec, value: ArrayLike) -> NDArray[Any]:
    """`value` as a C-contiguous array of the contract's dtype; itself where it is one already.

    Raises:
        InputError: not an array on the CPU, or of a dtype that cannot be cast by rule.
    """
    array = value if type(value) is np.ndarray else _as_array(spec, value)
    wanted = _DTYPES[spec.dtype]
    if array.dtype != wanted:
        both_float = array.dtype.kind == wanted.kind == "f"
        if not both_float and not (wanted.kind != "f" and np.can_cast(array.dtype, wanted, "safe")):
            raise InputError(f"{spec.name}: expected {spec.dtype}, got {array.dtype}", hint=_hint(spec, array))
        with np.errstate(over="ignore"):  # a float beyond float16 becomes Inf, which `require_finite` names
            array = array.astype(wanted)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def require_finite(name: str, array: NDArray[Any]) -> None:
    """Raise InputError where a float array holds NaN or Inf."""
    if array.dtype.kind != "f":
        return
    # Where the sum of squares is finite, each of them is; where it is not, it may only have overflowed.
    # (A sum of float16 is slow.)
    if array.size <= _FEW and array.itemsize > 2 and math.isfinite(np.vdot(array, array)):
        return
    if not np.isfinite(array).all():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise InputError(
            f"{name}: {bad} of {array.size} values are NaN or Inf as {array.dtype}; a state would keep them for ever",
            hint="clean the frame; StepLoop.open(..., check_finite=False) turns this check off",
        )


def _as_array(spec: TensorSpec, value: Any) -> NDArray[Any]:
    try:
        if hasattr(value, "__array__") or not hasattr(value, "__dlpack__"):
            return np.asarray(value)
        return np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(
            f"{spec.name}: expected an array that numpy can read, got {type(value).__name__}: {error}",
            hint="a tensor with gradients is detached first: x.detach()",
        ) from error


def _hint(spec: TensorSpec, array: NDArray[Any]) -> str:
    if spec.dtype.startswith("float") and array.dtype == np.uint8 and spec.range is not None:
        low, high = spec.range
        scaled = "frame.astype('float32') / 255"
        scaled += f" * {high - low:g}" if high - low != 1 else ""
        scaled += f" + {low:g}" if low else ""
        return f"scale pixels to the model's range {low:g} to {high:g} first: {scaled}"
    if spec.dtype.startswith("float"):
        return "scale to the model's range and convert first: array.astype('float32')"
    return f"convert first: array.astype({spec.dtype!r})"
