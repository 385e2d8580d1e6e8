"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.operators.convolution import same_pads, windows
from stepcell.runtime.evaluate.registry import Node, linear, register, unsupported

__all__: list[str] = []


@dataclass(frozen=True)
class _Window:
    """Windows of a pooling node: the padded size of each spatial axis, and its slice for each element."""

    pads: list[int]
    padded: list[int]
    taps: list[tuple[slice, ...]]
    sizes: list[int]

    def pad(self, x: Array, fill: float) -> Array:
        """`x` with `fill` around it."""
        if list(x.shape[2:]) == self.padded:
            return x
        whole = np.full((*x.shape[:2], *self.padded), fill, x.dtype)
        inner = (slice(before, before + size) for before, size in zip(self.pads, x.shape[2:], strict=False))
        whole[(slice(None), slice(None), *inner)] = x
        return whole

    def parts(self, whole: Array) -> list[Array]:
        """For each element of the kernel what it meets."""
        return [whole[(slice(None), slice(None), *tap)] for tap in self.taps]


def _window(node: Node, x: Array) -> _Window:
    kernel: list[int] = node.attributes["kernel_shape"]
    rank = len(kernel)
    strides, dilations = (list(node.get(name) or [1] * rank) for name in ("strides", "dilations"))
    extents = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    pads = same_pads(node, x.shape[2:], extents, strides)
    sizes, padded = [], []
    for axis in range(rank):
        total = x.shape[2 + axis] + pads[axis] + pads[axis + rank]
        room = total - extents[axis]
        size = (-(-room // strides[axis]) if node.get("ceil_mode", 0) else room // strides[axis]) + 1
        if node.get("ceil_mode", 0) and (size - 1) * strides[axis] >= x.shape[2 + axis] + pads[axis]:
            size -= 1  # a window that starts in the padding behind the input is none
        sizes.append(size)
        padded.append(max(total, (size - 1) * strides[axis] + extents[axis]))
    return _Window(pads, padded, list(windows(kernel, dilations, strides, sizes)), sizes)


def _max_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The tangent of the element that is the largest, the first where several are."""
    window = _window(node, inputs[0])
    change, taken = np.zeros_like(outputs[0]), np.zeros(outputs[0].shape, bool)
    values, moves = (window.parts(window.pad(array, fill)) for array, fill in ((inputs[0], -np.inf), (tangents[0], 0)))
    for value, move in zip(values, moves, strict=True):
        mine = (value == outputs[0]) & ~taken
        change[mine] = move[mine]
        taken |= mine
    return change


@register("MaxPool", jvp=_max_jvp)
def _max_pool(node: Node, x: Array) -> Array:
    if len(node.outputs) > 1 and node.outputs[1]:
        raise unsupported(node, "the indices of MaxPool are not implemented")
    window = _window(node, x)
    first, *others = window.parts(window.pad(x, -np.inf))
    y = first.copy()
    for part in others:
        np.maximum(y, part, out=y)
    return y


@register("AveragePool", jvp=linear)
def _average_pool(node: Node, x: Array) -> Array:
    window = _window(node, x)
    y = _sum(window.parts(window.pad(x, 0.0)))
    if node.get("count_include_pad", 0):
        inner = [size + window.pads[axis] + window.pads[axis + x.ndim - 2] for axis, size in enumerate(x.shape[2:])]
        outer = _Window([0] * len(inner), window.padded, window.taps, window.sizes)
        counts = _sum(outer.parts(outer.pad(np.ones((1, 1, *inner), x.dtype), 0.0)))
    else:
        counts = _sum(window.parts(window.pad(np.ones((1, 1, *x.shape[2:]), x.dtype), 0.0)))
    return y / counts


def _sum(parts: Sequence[Array]) -> Array:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


@register("GlobalAveragePool", jvp=linear)
def _global_average(node: Node, x: Array) -> Array:
    return np.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True, dtype=x.dtype)


def _global_max_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    n, c = inputs[0].shape[:2]
    flat = inputs[0].reshape(n, c, -1)
    index = flat.argmax(axis=2)[:, :, None]
    return np.take_along_axis(tangents[0].reshape(n, c, math.prod(inputs[0].shape[2:])), index, 2).reshape(
        outputs[0].shape
    )


@register("GlobalMaxPool", jvp=_global_max_jvp)
def _global_max(node: Node, x: Array) -> Array:
    return np.max(x, axis=tuple(range(2, x.ndim)), keepdims=True)
