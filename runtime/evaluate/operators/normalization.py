"""Normalisation layers and softmax. Means and variances are exact in the type that the layer is computed in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, register, unsupported

__all__: list[str] = []

Axes = tuple[int, ...]


def _normalised(x: Array, axes: Axes, epsilon: float) -> tuple[Array, Array, Array]:
    """(x - mean) / sqrt(variance + epsilon), the mean and the factor."""
    mean = np.mean(x, axis=axes, keepdims=True, dtype=x.dtype)
    centred = x - mean
    variance = np.mean(centred * centred, axis=axes, keepdims=True, dtype=x.dtype)
    factor = 1 / np.sqrt(variance + epsilon)
    return centred * factor, mean, factor


def _normalised_jvp(x: Array, dx: Array, axes: Axes, epsilon: float) -> Array:
    y, _, factor = _normalised(x, axes, epsilon)
    moved = dx - np.mean(dx, axis=axes, keepdims=True)
    change: Array = factor * (moved - y * np.mean(y * moved, axis=axes, keepdims=True))
    return change


def _per_channel(value: Array, x: Array) -> Array:
    return value.reshape(-1, *(1,) * (x.ndim - 2))


def _affine_jvp(y: Array, dy: Any, scale: Array, dscale: Any, dbias: Any) -> Any:
    change: Any = 0.0 if dy is None else dy * scale
    if dscale is not None:
        change = change + y * dscale
    return change if dbias is None else change + dbias


@register("BatchNormalization", jvp=lambda n, i, o, t: _batch_norm_jvp(n, i, t))
def _batch_norm(node: Node, x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Array:
    if node.get("training_mode", 0):
        raise unsupported(node, "training mode is not implemented")
    factor = scale / np.sqrt(variance + node.get("epsilon", 1e-5))
    y: Array = (x - _per_channel(mean, x)) * _per_channel(factor, x) + _per_channel(bias, x)
    return y.astype(x.dtype, copy=False)


def _batch_norm_jvp(node: Node, inputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    if any(tangent is not None for tangent in tangents[1:]):
        raise unsupported(node, "its derivative with respect to the statistics is not implemented")
    x, scale, _, _, variance = inputs
    return tangents[0] * _per_channel(scale / np.sqrt(variance + node.get("epsilon", 1e-5)), x)


def _spatial(x: Array) -> Axes:
    return tuple(range(2, x.ndim))


def _instance_norm_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, scale, _ = inputs
    dx, dscale, dbias = (
        None if t is None else t if index == 0 else _per_channel(t, x) for index, t in enumerate(tangents)
    )
    epsilon = node.get("epsilon", 1e-5)
    dy = None if dx is None else _normalised_jvp(x, dx, _spatial(x), epsilon)
    return _affine_jvp(_normalised(x, _spatial(x), epsilon)[0], dy, _per_channel(scale, x), dscale, dbias)


@register("InstanceNormalization", jvp=_instance_norm_jvp)
def _instance_norm(node: Node, x: Array, scale: Array, bias: Array) -> Array:
    y, _, _ = _normalised(x, _spatial(x), node.get("epsilon", 1e-5))
    return y * _per_channel(scale, x) + _per_channel(bias, x)


def _grouped(node: Node, x: Array) -> Array:
    return x.reshape(x.shape[0], node.attributes["num_groups"], -1)


def _group_affine(node: Node, value: Array, x: Array) -> Array:
    """Scale or bias of each channel; before opset 21 there was one for each group."""
    if value.size != x.shape[1]:
        value = np.repeat(value, x.shape[1] // value.size)
    return _per_channel(value, x)


def _group_norm_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, scale, _ = inputs
    epsilon, groups = node.get("epsilon", 1e-5), _grouped(node, x)
    dx = tangents[0]
    dscale, dbias = (None if t is None else _group_affine(node, t, x) for t in tangents[1:])
    dy = None if dx is None else _normalised_jvp(groups, _grouped(node, dx), (2,), epsilon).reshape(x.shape)
    y = _normalised(groups, (2,), epsilon)[0].reshape(x.shape)
    return _affine_jvp(y, dy, _group_affine(node, scale, x), dscale, dbias)


@register("GroupNormalization", jvp=_group_norm_jvp)
def _group_norm(node: Node, x: Array, scale: Array, bias: Array) -> Array:
    y = _normalised(_grouped(node, x), (2,), node.get("epsilon", 1e-5))[0].reshape(x.shape)
    return y * _group_affine(node, scale, x) + _group_affine(node, bias, x)


def _last(node: Node, x: Array) -> Axes:
    return tuple(range(node.get("axis", -1) % x.ndim, x.ndim))


def _layer_norm_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, scale = inputs[:2]
    dx, dscale, dbias = (*tangents, None)[:3]
    epsilon = node.get("epsilon", 1e-5)
    dy = None if dx is None else _normalised_jvp(x, dx, _last(node, x), epsilon)
    return _affine_jvp(_normalised(x, _last(node, x), epsilon)[0], dy, scale, dscale, dbias)


@register("LayerNormalization", jvp=_layer_norm_jvp)
def _layer_norm(node: Node, x: Array, scale: Array, bias: Array | None = None) -> tuple[Array, ...]:
    y, mean, factor = _normalised(x, _last(node, x), node.get("epsilon", 1e-5))
    y = y * scale
    return (y if bias is None else y + bias), mean, factor


def _rms(node: Node, x: Array) -> Array:
    square = np.mean(x * x, axis=_last(node, x), keepdims=True, dtype=x.dtype)
    factor: Array = 1 / np.sqrt(square + node.get("epsilon", 1e-5))
    return factor


def _rms_norm_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    (x, scale), (dx, dscale) = inputs, tangents
    factor = _rms(node, x)
    y = x * factor
    dy = None
    if dx is not None:
        dy = factor * (dx - y * np.mean(y * dx, axis=_last(node, x), keepdims=True))
    return _affine_jvp(y, dy, scale, dscale, None)


@register("RMSNormalization", jvp=_rms_norm_jvp)
def _rms_norm(node: Node, x: Array, scale: Array) -> Array:
    y: Array = x * _rms(node, x) * scale
    return y


def _lp_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    x, y, dx, axis = inputs[0], outputs[0], tangents[0], node.get("axis", -1)
    norm = np.sqrt(np.sum(x * x, axis=axis, keepdims=True))
    return (dx - y * np.sum(y * dx, axis=axis, keepdims=True)) / norm


@register("LpNormalization", jvp=_lp_jvp)
def _lp_norm(node: Node, x: Array) -> Array:
    if node.get("p", 2) != 2:
        raise unsupported(node, "another norm than L2 is not implemented")
    norm = np.sqrt(np.sum(x * x, axis=node.get("axis", -1), keepdims=True, dtype=x.dtype))
    return np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)


def _as_rows(node: Node, x: Array) -> tuple[Array, int]:
    """Since opset 13 softmax is along one axis, before along all from one on."""
    if node.opset >= 13:
        return x, node.get("axis", -1)
    axis = node.get("axis", 1) % max(x.ndim, 1)
    return x.reshape(math.prod(x.shape[:axis]), -1), 1


def _softmax_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    y, axis = _as_rows(node, outputs[0])
    moved, _ = _as_rows(node, tangents[0])
    if node.op == "LogSoftmax":
        change = moved - np.sum(np.exp(y) * moved, axis=axis, keepdims=True)
    else:
        change = y * (moved - np.sum(y * moved, axis=axis, keepdims=True))
    return change.reshape(outputs[0].shape)


@register("Softmax", "LogSoftmax", jvp=_softmax_jvp)
def _softmax(node: Node, x: Array) -> Array:
    rows, axis = _as_rows(node, x)
    shifted = rows - np.max(rows, axis=axis, keepdims=True)
    total = np.sum(np.exp(shifted), axis=axis, keepdims=True, dtype=x.dtype)
    y = shifted - np.log(total) if node.op == "LogSoftmax" else np.exp(shifted) / total
    return y.reshape(x.shape)
