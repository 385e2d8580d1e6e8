"""QuantizeLinear and DequantizeLinear between floats and 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, register, unsupported

__all__: list[str] = []


def _along(node: Node, values: Array, x: Array) -> Array:
    """A scale or a zero point for each index of the axis, or one for all."""
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    if node.get("block_size", 0):
        raise unsupported(node, "scales of blocks are not implemented")
    axis = node.get("axis", 1) % x.ndim
    return values.reshape([-1 if index == axis else 1 for index in range(x.ndim)])


def _quantize_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """As if nothing were rounded: a change that is large beside a level passes, on average, as it is.

    Where the integer is at a limit, nothing passes.
    """
    if tangents[0] is None:
        return None
    limits = np.iinfo(outputs[0].dtype)
    inside = (outputs[0] > limits.min) & (outputs[0] < limits.max)
    return np.where(inside, tangents[0] / _along(node, inputs[1], inputs[0]), 0.0)


@register("QuantizeLinear", jvp=_quantize_jvp, rounds=False)
def _quantize(node: Node, x: Array, scale: Array, zero: Array | None = None) -> Array:
    dtype = np.dtype(np.uint8) if zero is None else zero.dtype
    if dtype.kind not in "iu" or dtype.itemsize > 2:
        raise unsupported(node, f"{dtype} is not implemented")
    shift = 0 if zero is None else _along(node, zero, x).astype(np.float64)
    limits = np.iinfo(dtype)
    levels = np.rint(np.asarray(x / _along(node, scale, x), np.float64)) + shift
    return np.clip(levels, limits.min, limits.max).astype(dtype)


def _dequantize_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return None if tangents[0] is None else tangents[0] * _along(node, inputs[1], inputs[0])


@register("DequantizeLinear", jvp=_dequantize_jvp, rounds=False)
def _dequantize(node: Node, x: Array, scale: Array, zero: Array | None = None) -> Array:
    shift = 0 if zero is None else _along(node, zero, x).astype(np.int64)
    result: Array = (x.astype(np.int64) - shift).astype(scale.dtype) * _along(node, scale, x)
    return result
