"""Operators that pick elements: by index, by condition, by order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, linear, no_derivative, register

__all__: list[str] = []


@register("Gather", jvp=linear, rounds=False)
def _gather(node: Node, x: Array, indices: Array) -> Array:
    return np.take(x, indices, axis=node.get("axis", 0))


@register("GatherElements", jvp=linear, rounds=False)
def _gather_elements(node: Node, x: Array, indices: Array) -> Array:
    axis = node.get("axis", 0)
    grid = np.indices(indices.shape, sparse=True)
    positions = [*grid[:axis], indices, *grid[axis % x.ndim + 1 :]]
    return x[tuple(positions)]


@register("GatherND", jvp=linear, rounds=False)
def _gather_nd(node: Node, x: Array, indices: Array) -> Array:
    batch = node.get("batch_dims", 0)
    leading: Any = np.indices(indices.shape[:batch], sparse=True)
    shape = indices.shape[:-1]
    rows = [rank.reshape(rank.shape + (1,) * (len(shape) - batch)) for rank in leading]
    return x[(*rows, *np.moveaxis(indices, -1, 0))]


def _scatter_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    if node.get("reduction", "none") not in ("none", "add"):
        return no_derivative(node, inputs, outputs, tangents)
    x, indices, updates = inputs
    parts = [np.zeros_like(v) if t is None else t for v, t in ((x, tangents[0]), (updates, tangents[2]))]
    return (_scatter_nd if node.op == "ScatterND" else _scatter_elements)(node, parts[0], indices, parts[1])


@register("ScatterElements", jvp=_scatter_jvp, rounds=False)
def _scatter_elements(node: Node, x: Array, indices: Array, updates: Array) -> Array:
    axis = node.get("axis", 0) % x.ndim
    grid = np.indices(indices.shape, sparse=True)
    return _scattered(node, x, (*grid[:axis], indices, *grid[axis + 1 :]), updates)


@register("ScatterND", jvp=_scatter_jvp, rounds=False)
def _scatter_nd(node: Node, x: Array, indices: Array, updates: Array) -> Array:
    return _scattered(node, x, tuple(np.moveaxis(indices, -1, 0)), updates)


def _scattered(node: Node, x: Array, positions: tuple[Array, ...], updates: Array) -> Array:
    y = x.copy()
    reduction = node.get("reduction", "none")
    if reduction == "none":
        y[positions] = updates
    else:
        ufuncs = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
        ufuncs[reduction].at(y, positions, updates)
    return y


def _where_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return np.where(inputs[0], *(0.0 if tangent is None else tangent for tangent in tangents[1:]))


@register("Where", jvp=_where_jvp, rounds=False)
def _where(node: Node, condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


@register("NonZero", rounds=False, data_dependent=True)
def _non_zero(node: Node, x: Array) -> Array:
    return np.stack(np.nonzero(x)).astype(np.int64)


@register("Compress", jvp=linear, rounds=False, data_dependent=True)
def _compress(node: Node, x: Array, condition: Array) -> Array:
    return np.compress(condition, x, axis=node.get("axis"))


@register("Trilu", jvp=linear, rounds=False)
def _trilu(node: Node, x: Array, k: Array | None = None) -> Array:
    offset = 0 if k is None else int(k.item())
    return np.triu(x, offset) if node.get("upper", 1) else np.tril(x, offset)


@register("ArgMax", "ArgMin", rounds=False)
def _arg(node: Node, x: Array) -> Array:
    axis = node.get("axis", 0)
    find = np.argmax if node.op == "ArgMax" else np.argmin
    if node.get("select_last_index", 0):
        index = x.shape[axis] - 1 - find(np.flip(x, axis), axis=axis, keepdims=True)
    else:
        index = find(x, axis=axis, keepdims=True)
    index = np.asarray(index, np.int64)
    return index if node.get("keepdims", 1) else index.squeeze(axis)


def _top_k_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    _, indices = _top_k(node, *inputs)
    return np.take_along_axis(tangents[0], indices, node.get("axis", -1)), None


@register("TopK", jvp=_top_k_jvp, rounds=False, shaping=range(1, 2))
def _top_k(node: Node, x: Array, k: Array) -> tuple[Array, Array]:
    axis, count = node.get("axis", -1), int(np.asarray(k).item())
    order = np.argsort(-x if node.get("largest", 1) else x, axis=axis, kind="stable")
    indices = np.take(order, range(count), axis=axis)
    return np.take_along_axis(x, indices, axis), indices.astype(np.int64)


@register("OneHot", rounds=False, shaping=range(1, 2))
def _one_hot(node: Node, indices: Array, depth: Array, values: Array) -> Array:
    axis, count = node.get("axis", -1), int(np.asarray(depth).item())
    hot = np.expand_dims(indices % count, axis) == np.arange(count).reshape(
        [-1 if place == axis % (indices.ndim + 1) else 1 for place in range(indices.ndim + 1)]
    )
    return np.where(hot, values[1], values[0])
