"""Reductions and running sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, as_ints, linear, register

__all__: list[str] = []


def _axes(node: Node, x: Array, axes: Array | None) -> tuple[int, ...] | None:
    """The axes to reduce, an input or an attribute; None: nothing is reduced."""
    chosen = as_ints(node.get("axes") if axes is None else axes)
    if chosen:
        return tuple(chosen)
    return None if node.get("noop_with_empty_axes", 0) else tuple(range(x.ndim))


def _keep(node: Node) -> bool:
    return bool(node.get("keepdims", 1))


@register("ReduceSum", jvp=linear, shaping=range(1, 2))
def _sum(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, x, axes)
    return x if chosen is None else np.sum(x, axis=chosen, keepdims=_keep(node), dtype=x.dtype)


@register("ReduceMean", jvp=linear, shaping=range(1, 2))
def _mean(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, x, axes)
    return x if chosen is None else np.mean(x, axis=chosen, keepdims=_keep(node), dtype=x.dtype)


def _extremum_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, tangent = inputs[0], tangents[0]
    chosen = _axes(node, x, inputs[1] if len(inputs) > 1 else None)
    if chosen is None or tangent is None:
        return tangent
    find = np.max if node.op == "ReduceMax" else np.min
    mine = x == find(x, axis=chosen, keepdims=True)
    count = np.sum(mine, axis=chosen, keepdims=_keep(node))
    return np.sum(np.where(mine, tangent, 0.0), axis=chosen, keepdims=_keep(node)) / count


@register("ReduceMax", "ReduceMin", jvp=_extremum_jvp, shaping=range(1, 2))
def _extremum(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, x, axes)
    find = np.max if node.op == "ReduceMax" else np.min
    return x if chosen is None else find(x, axis=chosen, keepdims=_keep(node))


def _prod_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    chosen = _axes(node, inputs[0], inputs[1] if len(inputs) > 1 else None)
    if chosen is None:
        return tangents[0]
    whole = np.prod(inputs[0], axis=chosen, keepdims=True)
    return np.sum(tangents[0] * whole / inputs[0], axis=chosen, keepdims=_keep(node))


@register("ReduceProd", jvp=_prod_jvp, shaping=range(1, 2))
def _prod(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, x, axes)
    return x if chosen is None else np.prod(x, axis=chosen, keepdims=_keep(node), dtype=x.dtype)


def _norm_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, tangent = inputs[0], tangents[0]
    chosen = _axes(node, x, inputs[1] if len(inputs) > 1 else None)
    keep = _keep(node)
    if node.op == "ReduceL1":
        return np.sum(np.sign(x) * tangent, axis=chosen, keepdims=keep)
    if node.op == "ReduceSumSquare":
        return np.sum(2 * x * tangent, axis=chosen, keepdims=keep)
    if node.op == "ReduceL2":
        return np.sum(x * tangent, axis=chosen, keepdims=keep) / outputs[0]
    if node.op == "ReduceLogSum":
        return np.sum(tangent, axis=chosen, keepdims=keep) / np.sum(x, axis=chosen, keepdims=keep)
    top = np.max(x, axis=chosen, keepdims=True)
    weights = np.exp(x - top)
    return np.sum(weights * tangent, axis=chosen, keepdims=keep) / np.sum(weights, axis=chosen, keepdims=keep)


@register(
    "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", jvp=_norm_jvp, shaping=range(1, 2)
)
def _norm(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen, keep = _axes(node, x, axes), _keep(node)
    if chosen is None:
        chosen = ()
    if node.op == "ReduceL1":
        return np.sum(np.abs(x), axis=chosen, keepdims=keep, dtype=x.dtype)
    if node.op == "ReduceSumSquare":
        return np.sum(x * x, axis=chosen, keepdims=keep, dtype=x.dtype)
    if node.op == "ReduceL2":
        return np.sqrt(np.sum(x * x, axis=chosen, keepdims=keep, dtype=x.dtype))
    if node.op == "ReduceLogSum":
        return np.log(np.sum(x, axis=chosen, keepdims=keep, dtype=x.dtype))
    top = np.max(x, axis=chosen, keepdims=True)
    total = np.log(np.sum(np.exp(x - top), axis=chosen, keepdims=True)) + top
    return total if keep else np.squeeze(total, chosen)


@register("CumSum", jvp=linear)
def _cumsum(node: Node, x: Array, axis: Array) -> Array:
    along = int(np.asarray(axis).item())
    if node.get("reverse", 0):
        x = np.flip(x, along)
    y = np.cumsum(x, axis=along, dtype=x.dtype)
    if node.get("exclusive", 0):
        y = y - x
    return np.flip(y, along) if node.get("reverse", 0) else y
