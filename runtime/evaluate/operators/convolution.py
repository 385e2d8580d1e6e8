"""Convolutions and matrix products: all of them end in one product of the BLAS library.

A convolution copies the windows of its input into the columns of a matrix, as many rows of the
result at a time as stay in the cache, and multiplies the weights with it. Products are accumulated
in the type of the arrays, float32 for floats of 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, register, unsupported

__all__ = ["same_pads", "windows"]

_BLOCK = 1 << 20  # bytes of columns at a time


def same_pads(node: Node, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Padding before and after each spatial axis: as the node says, or by its `auto_pad`.

    Args:
        window: size of the kernel, dilation included.
    """
    auto = node.get("auto_pad", "NOTSET")
    if auto == "NOTSET":
        return list(node.get("pads") or [0] * (2 * len(sizes)))
    if auto == "VALID":
        return [0] * (2 * len(sizes))
    totals = [
        max((-(-size // stride) - 1) * stride + extent - size, 0)
        for size, extent, stride in zip(sizes, window, strides, strict=True)
    ]
    smaller, larger = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return smaller + larger if auto == "SAME_UPPER" else larger + smaller


def windows(
    kernel: Sequence[int], dilations: Sequence[int], strides: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """For each element of the kernel, in C order: what it meets of a padded input.

    Args:
        sizes: sizes of the result.
    """
    for offsets in product(*(range(size) for size in kernel)):
        yield tuple(
            slice(offset * dilation, offset * dilation + (size - 1) * stride + 1, stride)
            for offset, dilation, stride, size in zip(offsets, dilations, strides, sizes, strict=True)
        )


def _padded(x: Array, pads: Sequence[int]) -> Array:
    rank = x.ndim - 2
    if not any(pads):
        return x
    sizes = [size + pads[axis] + pads[axis + rank] for axis, size in enumerate(x.shape[2:])]
    whole = np.zeros((*x.shape[:2], *sizes), x.dtype)
    inner = tuple(slice(pads[axis], pads[axis] + size) for axis, size in enumerate(x.shape[2:]))
    whole[(slice(None), slice(None), *inner)] = x
    return whole


def _convolve(node: Node, x: Array, w: Array) -> Array:
    rank = x.ndim - 2
    strides, dilations = (list(node.get(name) or [1] * rank) for name in ("strides", "dilations"))
    kernel, groups = w.shape[2:], node.get("group", 1)
    extents = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    x = _padded(x, same_pads(node, x.shape[2:], extents, strides))
    sizes = [(size - extent) // stride + 1 for size, extent, stride in zip(x.shape[2:], extents, strides, strict=True)]
    y = np.empty((x.shape[0], w.shape[0], *sizes), np.result_type(x, w))
    taps = list(windows(kernel, dilations, strides, sizes))
    if w.shape[1] == 1 and w.shape[0] == x.shape[1]:
        return _depthwise(x, w, taps, y)
    matrix = np.ascontiguousarray(w.reshape(groups, w.shape[0] // groups, -1))
    for image, result in zip(x, y, strict=True):
        if len(taps) == 1:
            columns = image[(slice(None), *taps[0])].reshape(groups, w.shape[1], -1)
            np.matmul(matrix, columns, out=result.reshape(groups, w.shape[0] // groups, -1))
        else:
            _by_blocks(image, matrix, taps, strides[0], result)
    return y


def _by_blocks(image: Array, matrix: Array, taps: Sequence[tuple[slice, ...]], stride: int, result: Array) -> None:
    """One image (channels, ...): windows into columns, a few rows of the result at a time."""
    groups, outputs, _ = matrix.shape
    channels, (height, *others) = image.shape[0], result.shape[1:]
    row = channels * len(taps) * math.prod(others)
    rows = max(1, min(height, _BLOCK // max(1, row * image.itemsize)))
    flat = result.reshape(groups, outputs, -1)
    buffer = np.empty((channels, len(taps), rows, *others), image.dtype)
    for first in range(0, height, rows):
        count = min(rows, height - first)
        columns = buffer[:, :, :count]
        for number, (top, *rest) in enumerate(taps):
            start = top.start + first * stride
            columns[:, number] = image[(slice(None), slice(start, start + (count - 1) * stride + 1, stride), *rest)]
        area = math.prod(others)
        product_of = columns.reshape(groups, matrix.shape[2], count * area)
        flat[:, :, first * area : (first + count) * area] = matrix @ product_of


def _depthwise(x: Array, w: Array, taps: Sequence[tuple[slice, ...]], y: Array) -> Array:
    """One kernel for each channel: a sum over its elements, without a product of matrices."""
    kernels = w.reshape(1, w.shape[0], len(taps), *(1,) * (x.ndim - 2))
    term = np.empty_like(y)
    for number, tap in enumerate(taps):
        part = x[(slice(None), slice(None), *tap)]
        if number == 0:
            np.multiply(part, kernels[:, :, 0], out=y)
        else:
            np.multiply(part, kernels[:, :, number], out=term)
            y += term
    return y


def _convolution_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    convolve = _convolve if node.op == "Conv" else _convolve_transposed
    x, w = inputs[:2]
    dx, dw, db = (*tangents, None, None)[:3]
    change: Any = 0.0
    if dx is not None:
        change = convolve(node, dx, w)
    if dw is not None:
        change = change + convolve(node, x, dw)
    if db is not None:
        change = change + db.reshape(-1, *(1,) * (x.ndim - 2))
    return change


@register("Conv", jvp=_convolution_jvp)
def _conv(node: Node, x: Array, w: Array, b: Array | None = None) -> Array:
    y = _convolve(node, x, w)
    if b is not None:
        y += b.reshape(-1, *(1,) * (x.ndim - 2))
    return y


def _convolve_transposed(node: Node, x: Array, w: Array) -> Array:
    rank, groups = x.ndim - 2, node.get("group", 1)
    strides, dilations = (list(node.get(name) or [1] * rank) for name in ("strides", "dilations"))
    kernel, extra = w.shape[2:], list(node.get("output_padding") or [0] * rank)
    full = [
        (size - 1) * stride + (extent - 1) * dilation + 1
        for size, stride, extent, dilation in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    sizes, before = _transposed_sizes(node, x.shape[2:], strides, full, extra)
    whole = np.zeros(
        (x.shape[0], w.shape[1] * groups, *(max(a, b + c) for a, b, c in zip(full, before, sizes, strict=True))),
        x.dtype,
    )
    matrix = w.reshape(groups, w.shape[0] // groups, -1).transpose(0, 2, 1)
    for image, result in zip(x, whole, strict=True):
        columns = matrix @ image.reshape(groups, w.shape[0] // groups, -1)
        parts = columns.reshape(-1, math.prod(kernel), *x.shape[2:])
        for number, tap in enumerate(windows(kernel, dilations, strides, x.shape[2:])):
            result[(slice(None), *tap)] += parts[:, number]
    inner = tuple(slice(start, start + size) for start, size in zip(before, sizes, strict=True))
    return np.ascontiguousarray(whole[(slice(None), slice(None), *inner)])


def _transposed_sizes(
    node: Node, sizes: Sequence[int], strides: Sequence[int], full: Sequence[int], extra: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Sizes of the result of a transposed convolution, and how much is cut off before it."""
    rank, auto = len(sizes), node.get("auto_pad", "NOTSET")
    wanted = node.get("output_shape")
    if wanted is None and auto in ("NOTSET", "VALID"):
        pads = list(node.get("pads") or [0] * (2 * rank)) if auto == "NOTSET" else [0] * (2 * rank)
        return [full[axis] + extra[axis] - pads[axis] - pads[axis + rank] for axis in range(rank)], pads[:rank]
    target = list(wanted)[-rank:] if wanted is not None else [a * b for a, b in zip(sizes, strides, strict=True)]
    totals = [full[axis] + extra[axis] - target[axis] for axis in range(rank)]
    if any(total < 0 for total in totals):
        raise unsupported(node, "an output larger than the transposed convolution is not implemented")
    return target, [total - total // 2 if auto == "SAME_LOWER" else total // 2 for total in totals]


@register("ConvTranspose", jvp=_convolution_jvp)
def _conv_transpose(node: Node, x: Array, w: Array, b: Array | None = None) -> Array:
    y = _convolve_transposed(node, x, w)
    if b is not None:
        y += b.reshape(-1, *(1,) * (x.ndim - 2))
    return y


def _matmul_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    (a, b), (da, db) = inputs, tangents
    change: Any = 0.0
    if da is not None:
        change = np.matmul(da, b)
    if db is not None:
        change = change + np.matmul(a, db)
    return change


@register("MatMul", jvp=_matmul_jvp)
def _matmul(node: Node, a: Array, b: Array) -> Array:
    return np.matmul(a, b)


def _gemm_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    a, b = inputs[:2]
    da, db, dc = (*tangents, None)[:3]
    change: Any = 0.0
    if da is not None:
        change = _product(node, da, b)
    if db is not None:
        change = change + _product(node, a, db)
    if dc is not None:
        change = change + node.get("beta", 1.0) * dc
    return change


def _product(node: Node, a: Array, b: Array) -> Array:
    y = np.matmul(a.T if node.get("transA", 0) else a, b.T if node.get("transB", 0) else b)
    alpha = node.get("alpha", 1.0)
    return y if alpha == 1.0 else alpha * y


@register("Gemm", jvp=_gemm_jvp)
def _gemm(node: Node, a: Array, b: Array, c: Array | None = None) -> Array:
    y = _product(node, a, b)
    beta = node.get("beta", 1.0)
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def _einsum_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    change: Any = 0.0
    for index, tangent in enumerate(tangents):
        if tangent is not None:
            change = change + _einsum(node, *inputs[:index], tangent, *inputs[index + 1 :])
    return change


@register("Einsum", jvp=_einsum_jvp)
def _einsum(node: Node, *inputs: Array) -> Array:
    return np.asarray(np.einsum(node.attributes["equation"], *inputs, optimize=True))
