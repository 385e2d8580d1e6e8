"""Operators that change or give shapes: elements keep their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, as_ints, linear, register, unsupported

__all__: list[str] = []


@register("Shape", rounds=False)
def _shape(node: Node, x: Array) -> Array:
    return np.array(x.shape[node.get("start", 0) : node.get("end", None)], np.int64)


@register("Size", rounds=False)
def _size(node: Node, x: Array) -> Array:
    return np.array(x.size, np.int64)


@register("Constant", rounds=False)
def _constant(node: Node) -> Array:
    for name, kind in (("float", np.float32), ("floats", np.float32), ("int", np.int64), ("ints", np.int64)):
        value = node.get(f"value_{name}")
        if value is not None:
            array: Array = np.array(value, kind)
            return array.astype(node.widening.of(array.dtype))
    if "value" not in node.attributes:
        raise unsupported(node, f"a constant of the form {', '.join(node.attributes)} is not implemented")
    constant: Array = node.attributes["value"]
    return constant


@register("ConstantOfShape", rounds=False, shaping=range(1))
def _constant_of_shape(node: Node, shape: Array) -> Array:
    value = node.get("value")
    if value is None:
        value = np.zeros(1, node.widening.of(np.dtype(np.float32)))
    return np.full(as_ints(shape), value.reshape(()), value.dtype)


@register("Range", rounds=False, shaping=range(3))
def _range(node: Node, start: Array, limit: Array, delta: Array) -> Array:
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return (start + np.arange(count) * delta).astype(start.dtype)


@register("Reshape", jvp=linear, rounds=False, shaping=range(1, 2))
def _reshape(node: Node, x: Array, shape: Array) -> Array:
    sizes = as_ints(shape)
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@register("Flatten", jvp=linear, rounds=False)
def _flatten(node: Node, x: Array) -> Array:
    axis = node.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@register("Transpose", jvp=linear, rounds=False)
def _transpose(node: Node, x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(node.get("perm")))


def _axes(node: Node, axes: Array | None) -> list[int]:
    """An input since opset 13, an attribute before."""
    return as_ints(node.get("axes") if axes is None else axes)


@register("Squeeze", jvp=linear, rounds=False, shaping=range(1, 2))
def _squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, axes)
    return np.squeeze(x, tuple(chosen) if chosen else None)


@register("Unsqueeze", jvp=linear, rounds=False, shaping=range(1, 2))
def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, tuple(_axes(node, axes)))


@register("Expand", jvp=linear, rounds=False, shaping=range(1, 2))
def _expand(node: Node, x: Array, shape: Array) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(as_ints(shape))))


@register("Tile", jvp=linear, rounds=False, shaping=range(1, 2))
def _tile(node: Node, x: Array, repeats: Array) -> Array:
    return np.tile(x, as_ints(repeats))


def _concat_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Array:
    parts = [np.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
    return _concat(node, *parts)


@register("Concat", jvp=_concat_jvp, rounds=False)
def _concat(node: Node, *parts: Array) -> Array:
    return np.concatenate(parts, axis=node.attributes["axis"])


@register("Split", jvp=linear, rounds=False, shaping=range(1, 2))
def _split(node: Node, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    axis = node.get("axis", 0)
    parts = as_ints(node.get("split") if sizes is None else sizes)
    if not parts:
        count = node.get("num_outputs", len(node.outputs))
        each = -(-x.shape[axis] // count)
        parts = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
    return tuple(np.split(x, np.cumsum(parts)[:-1].tolist(), axis=axis))


def slices(node: Node, x: Array, limits: Sequence[Array | None]) -> tuple[slice, ...]:
    """What `Slice` takes of each axis: inputs since opset 10, attributes before."""
    starts, ends, axes, steps = (as_ints(value) for value in (*limits, None, None, None, None)[:4])
    if node.opset < 10:
        starts, ends, axes = (as_ints(node.get(name)) for name in ("starts", "ends", "axes"))
    chosen = [slice(None)] * x.ndim
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True
    ):
        size = x.shape[axis]
        stop: int | None = end
        if step < 0:  # an end before the first element is written as a number below -size
            start = min(start, size - 1)
            stop = None if end < -size else end
        chosen[axis] = slice(start, stop, step)
    return tuple(chosen)


@register("Slice", jvp=linear, rounds=False, shaping=range(1, 5))
def _slice(node: Node, x: Array, *limits: Array | None) -> Array:
    return x[slices(node, x, limits)]


@register("DepthToSpace", jvp=linear, rounds=False)
def _depth_to_space(node: Node, x: Array) -> Array:
    n, c, h, w = x.shape
    block = node.attributes["blocksize"]
    if node.get("mode", "DCR") == "DCR":
        parts = x.reshape(n, block, block, c // block**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // block**2, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // block**2, h * block, w * block)


@register("SpaceToDepth", jvp=linear, rounds=False)
def _space_to_depth(node: Node, x: Array) -> Array:
    n, c, h, w = x.shape
    block = node.attributes["blocksize"]
    parts = x.reshape(n, c, h // block, block, w // block, block).transpose(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


def _pad_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    if tangents[0] is None:
        return None
    widths = _pad_widths(node, *inputs)
    return _padded(tangents[0], widths, node.get("mode", "constant"), 0.0)


@register("Pad", jvp=_pad_jvp, rounds=False, shaping=range(1, 4))
def _pad(node: Node, x: Array, *limits: Array | None) -> Array:
    value = limits[1] if len(limits) > 1 else None
    fill = node.get("value", 0.0) if value is None else np.asarray(value).reshape(()).item()
    return _padded(x, _pad_widths(node, x, *limits), node.get("mode", "constant"), fill)


def _pad_widths(node: Node, x: Array, *limits: Array | None) -> list[tuple[int, int]]:
    pads = as_ints(node.get("pads") if node.opset < 11 else limits[0])
    axes = as_ints(limits[2]) if len(limits) > 2 else []
    widths = [(0, 0)] * x.ndim
    for index, axis in enumerate(axes or range(x.ndim)):
        widths[axis] = pads[index], pads[index + len(pads) // 2]
    return widths


def _padded(x: Array, widths: Sequence[tuple[int, int]], mode: str, fill: float) -> Array:
    cropped = tuple(
        slice(max(-before, 0), size - max(-after, 0)) for size, (before, after) in zip(x.shape, widths, strict=True)
    )
    x, positive = x[cropped], [(max(before, 0), max(after, 0)) for before, after in widths]
    if mode == "constant":
        y = np.full([size + sum(width) for size, width in zip(x.shape, positive, strict=True)], fill, x.dtype)
        y[tuple(slice(before, before + size) for size, (before, _) in zip(x.shape, positive, strict=True))] = x
        return y
    names: dict[str, Any] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
    return np.pad(x, positive, mode=names[mode])
