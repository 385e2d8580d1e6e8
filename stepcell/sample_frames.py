"""Frames to check and to time a model with: values of the declared range, the same at every call.

They are used by the comparison after `export` and `fuse`, by `stepcell verify` and by `stepcell bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import TensorSpec
from stepcell.pixels import picture_channels, value_range

__all__ = ["random_frame", "smooth_frame", "undeclared_integers"]

_SMALL_INTEGERS = ("uint8", "int8", "uint16", "int16")


def random_frame(spec: TensorSpec, shape: Sequence[int], rng: np.random.Generator) -> NDArray[Any]:
    """Independent uniform values over the whole range: the hardest input for a recurrence.

    Integers have every value of the range, floats without a range -1 to 1. An input that has a value in the contract
    keeps it.
    """
    if spec.value:
        return spec.filled(shape)
    low, high = _range(spec)
    if spec.dtype.startswith("float"):
        return _normalised(spec, np.asarray(rng.uniform(low, high, shape)))
    return np.asarray(rng.integers(int(np.ceil(low)), int(np.floor(high)) + 1, shape), spec.dtype)


def smooth_frame(spec: TensorSpec, shape: Sequence[int], t: int) -> NDArray[Any]:
    """Frame number `t` of a slowly moving wave over 90 % of the range: states converge, and drift shows."""
    if spec.value:
        return spec.filled(shape)
    low, high = _range(spec)
    phase = np.zeros((1,) * len(shape))
    for axis, size in enumerate(shape):
        ramp = np.arange(size) * 0.13 * (axis + 1)
        phase = phase + ramp.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    wave = low + (high - low) * (0.5 + 0.45 * np.sin(phase + 0.05 * t))
    return _normalised(spec, wave) if spec.dtype.startswith("float") else np.asarray(np.rint(wave), spec.dtype)


def undeclared_integers(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The integer inputs whose valid values are not declared: they may be indices, which have a limit of their own."""
    return [spec for spec in specs if spec.dtype[:3] in ("int", "uin") and spec.range is None]


def _range(spec: TensorSpec) -> tuple[float, float]:
    declared = value_range(spec)
    if declared is not None:
        return declared
    if spec.dtype.startswith("float"):
        return -1.0, 1.0
    if spec.dtype in _SMALL_INTEGERS:
        info = np.iinfo(spec.dtype)
        return float(info.min), float(info.max)
    return (0.0, 255.0) if picture_channels(spec) == 3 else (0.0, 1.0)  # 0 and 1 are valid labels and indices


def _normalised(spec: TensorSpec, values: NDArray[np.float64]) -> NDArray[Any]:
    """With mean and std of the channels, as pixels have them."""
    if spec.layout is not None and "C" in spec.layout and (spec.mean or spec.std):
        axis = spec.layout.index("C")
        column = [-1 if place == axis else 1 for place in range(values.ndim)]
        mean = np.broadcast_to(spec.mean or 0.0, values.shape[axis]).reshape(column)
        std = np.broadcast_to(spec.std or 1.0, values.shape[axis]).reshape(column)
        values = (values - mean) / std
    return np.asarray(values, spec.dtype)
