"""Kernels of single Conv, Gemm and MatMul nodes as plain "same" convolutions."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.values import Array, floats, rank

__all__ = ["diagonal_of", "full_kernel", "is_dilated", "matrix_kernel", "obstacle_in", "pad_kernel"]


def obstacle_in(node: ir.Node) -> str | None:
    """Why a Conv is not a stride 1, zero "same" convolution with constant weights and an odd kernel."""
    if any(v is not None and v.const_value is None for v in node.inputs[1:]):
        return "the convolution's weights are not constant"
    source, weight = node.inputs[:2]
    assert source is not None
    assert weight is not None
    assert weight.const_value is not None
    sizes = tuple(int(size) for size in weight.const_value.shape[2:])  # type: ignore[arg-type]
    if len(sizes) != 2:
        return f"a convolution over {len(sizes)} axes"
    if any(stride != 1 for stride in _ints(node, "strides", (1, 1))):
        return "a convolution with a stride"
    if any(size % 2 == 0 for size in sizes):
        return f"an even kernel ({sizes[0]}x{sizes[1]}) has asymmetric padding"
    reach = [d * (size - 1) // 2 for d, size in zip(_ints(node, "dilations", (1, 1)), sizes, strict=True)]
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    pads = (0, 0, 0, 0) if auto == "VALID" else _ints(node, "pads", (0, 0, 0, 0))
    if not (auto or "").startswith("SAME") and pads != (*reach, *reach):
        before = source.producer()
        if before is not None and before.op_type == "Pad":
            return f"{before.attributes.get_string('mode', 'constant')} padding before the convolution"
        return f"padding {list(pads)} is not the zero padding that keeps the size"
    return None


def full_kernel(node: ir.Node) -> Array:
    """The weight as one group and without dilation."""
    weight = node.inputs[1]
    assert weight is not None
    w = floats(weight)
    groups = node.attributes.get_int("group", 1) or 1
    if groups > 1:
        out, per_group = len(w) // groups, w.shape[1]
        full = np.zeros((len(w), groups * per_group, *w.shape[2:]))
        for g in range(groups):
            full[g * out : (g + 1) * out, g * per_group : (g + 1) * per_group] = w[g * out : (g + 1) * out]
        w = full
    down, right = _ints(node, "dilations", (1, 1))
    if (down, right) != (1, 1):
        stuffed = np.zeros((*w.shape[:2], down * (w.shape[2] - 1) + 1, right * (w.shape[3] - 1) + 1))
        stuffed[:, :, ::down, ::right] = w
        w = stuffed
    return w


def matrix_kernel(node: ir.Node) -> Array | None:
    """The weight of a Gemm or MatMul over features [N, F] as a 1x1 kernel; None if it is not of that form."""
    source, weight = node.inputs[:2]
    if source is None or weight is None or weight.const_value is None or rank(weight) != 2 or rank(source) != 2:
        return None
    w = floats(weight)
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return None
        w = (w if node.attributes.get_int("transB", 0) else w.T) * (node.attributes.get_float("alpha", 1.0) or 0.0)
    else:
        w = w.T
    return w[:, :, None, None]


def is_dilated(node: ir.Node) -> bool:
    """Whether its dilation is larger than 1."""
    return any(dilation > 1 for dilation in _ints(node, "dilations", (1, 1)))


def diagonal_of(kernel: Array) -> Array | None:
    """The factors [C] of a 1x1 kernel that mixes no channels, else None."""
    if kernel.shape[2:] != (1, 1) or kernel.shape[0] != kernel.shape[1]:
        return None
    factors = np.diagonal(kernel[:, :, 0, 0])
    return factors if np.array_equal(kernel[:, :, 0, 0], np.diag(factors)) else None


def pad_kernel(kernel: Array, size: tuple[int, ...]) -> Array:
    """A smaller odd kernel in the middle of a larger one of zeros: the same convolution."""
    top, left = ((size[i] - kernel.shape[2 + i]) // 2 for i in (0, 1))
    return np.pad(kernel, ((0, 0), (0, 0), (top, top), (left, left)))


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, default) or default)
