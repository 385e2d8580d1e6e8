"""Difference of one tensor between two models: of floats by their values, of integers by the share that differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import ExportError, ParityError

__all__ = ["Difference", "difference"]

Array = NDArray[Any]
_LEVEL = 1.0  # a float next to a rounding boundary becomes one level more or less of a byte


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor at one step, and its tolerance.

    Attributes:
        measure: "values": the largest absolute difference. "share": the share of elements that differ by more than
            rounding.
        error: as `measure` says.
        limit: of `error`.
        largest: the largest absolute difference.
        rounding: difference of integers that counts as rounding.
        differing: share of the elements that differ at all; None: the tensor is of floats.
    """

    measure: Literal["values", "share"]
    error: float
    limit: float
    largest: float
    rounding: float = 0.0
    differing: float | None = None

    @property
    def is_beyond(self) -> bool:
        return not self.error <= self.limit

    @property
    def said(self) -> str:
        """For a message: by how much, and what the limit is."""
        if self.measure == "values":
            return f"by {self.error:.3g}, the limit is {self.limit:.3g},"
        by = f" by more than {self.rounding:.3g}" if self.rounding else ""
        return f"in {self.error:.2%} of its elements{by}, the limit is {self.limit:.2%},"


def difference(name: str, truth: Array, value: Array, tolerance: float, subject: str, t: int) -> Difference:
    """Compare one tensor with what is taken as correct.

    Floats differ by at most tolerance * max(1, largest value). Integers come from floats by rounding or argmax, where
    the last bit of a float decides about a whole level or another label: so few of them may differ, a share of
    `tolerance` or one element. In integers of 8 and 16 bits, such as the bytes of a picture, one level is no
    difference, and neither is what the tolerance of floats allows; a label, an index or a flag differs or does not.

    Args:
        truth: what is taken as correct.
        tolerance: of this precision.
        subject: what messages call it.
        t: number of the step.

    Raises:
        ParityError: the shapes differ.
        ExportError: `truth` holds NaN.
    """
    if truth.shape != value.shape:
        raise ParityError(f"{name}: has shape {truth.shape} in {subject} and {value.shape} in its replacement")
    if truth.dtype.kind == "f" and np.isnan(truth).any():
        raise ExportError(
            f"{name}: {subject} returns NaN at step {t}, so nothing can be compared",
            hint="weights with NaN or Inf, or a state that grows without bound?",
        )
    wide, other = truth.astype(np.float64), value.astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf on both sides
        apart = np.where(truth == value, 0.0, np.abs(other - wide))
    largest = float(apart.max(initial=0.0))
    largest = largest if np.isfinite(largest) else float("inf")
    limit = tolerance * max(1.0, float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0)))
    if truth.dtype.kind == "f":
        return Difference("values", largest, limit, largest)
    levels = truth.dtype.kind in "iu" and truth.dtype.itemsize <= 2
    rounding = max(_LEVEL, limit) if levels else 0.0
    beyond = float(np.mean(apart > rounding)) if truth.size else 0.0
    allowed = max(tolerance, 1 / max(1, truth.size))
    differing = float(np.mean(truth != value)) if truth.size else 0.0
    return Difference("share", beyond, allowed, largest, rounding, differing)
