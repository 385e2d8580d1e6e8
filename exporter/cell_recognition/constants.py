"""Constants of a graph as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

__all__ = ["Array", "floats", "integers"]

Array = NDArray[np.floating[Any]]


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant list (or single number) of integers; None if it is absent or no constant."""
    if value is None or value.const_value is None:
        return None
    return [int(item) for item in value.const_value.numpy().reshape(-1)]


def floats(value: ir.Value) -> Array:
    """A constant tensor in float64; the value must be a constant."""
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)
