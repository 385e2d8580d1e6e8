"""Error measures of arrays: rms, largest value, norm; infinite where a value is NaN or Inf on one side only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["compared_steps", "deviation", "difference", "max_abs", "norm", "rms", "scale", "wide"]

Array = NDArray[Any]


def wide(array: Array) -> NDArray[np.float64]:
    """As float64."""
    return np.asarray(array, np.float64)


def difference(a: Array, b: Array) -> NDArray[np.float64]:
    """`a - b` in float64; 0 where both are the same NaN or Inf, infinite where only one is."""
    left, right = wide(a), wide(b)
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = left - right
    strange = ~np.isfinite(found)
    if strange.any():
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        found = np.where(strange, np.where(same, 0.0, np.inf), found)
    return found


def deviation(got: Array, truth: Array) -> tuple[float, float]:
    """The largest absolute difference, and for floats the rms difference, for integers the share that differs.

    Integers of up to 16 bits, such as bytes of a picture, differ where they are more than one level apart: one level is
    the rounding of a float. Labels, which are wider integers, and booleans differ or do not.
    """
    wrong = difference(got, truth)
    if truth.dtype.kind == "f":
        return max_abs(wrong), rms(wrong)
    rounding = 1.0 if truth.dtype.kind in "iu" and truth.dtype.itemsize <= 2 else 0.0
    return max_abs(wrong), float(np.mean(np.abs(wrong) > rounding)) if wrong.size else 0.0


def rms(array: Array) -> float:
    """Root of the mean square; 0 for an empty array."""
    return float(np.sqrt(np.mean(np.square(wide(array))))) if array.size else 0.0


def max_abs(array: Array) -> float:
    """Largest absolute value."""
    return float(np.abs(wide(array)).max()) if array.size else 0.0


def scale(arrays: Sequence[Array]) -> float:
    """Largest absolute value of all of them."""
    return max((max_abs(array) for array in arrays), default=0.0)


def norm(arrays: Mapping[str, Array]) -> float:
    """Euclidean norm of all arrays together."""
    return float(np.sqrt(sum(float(np.square(wide(array)).sum()) for array in arrays.values())))


def compared_steps(steps: int) -> list[int]:
    """1, 2, 4, 8, ... and the last."""
    found = [1 << power for power in range(steps.bit_length()) if 1 << power < steps]
    return [*found, steps]
