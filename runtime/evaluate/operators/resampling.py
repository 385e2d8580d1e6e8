"""Resize, Upsample and GridSample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, as_ints, linear, register, unsupported

__all__: list[str] = []


@register("Resize", jvp=linear, shaping=range(1, 4))
def _resize(node: Node, x: Array, *settings: Array | None) -> Array:
    if node.opset < 11:
        scales, sizes, mapping = settings[0], None, "asymmetric"
    else:
        _, scales, sizes = (*settings, None, None, None)[:3]
        mapping = node.get("coordinate_transformation_mode", "half_pixel")
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise unsupported(node, "a kept aspect ratio is not implemented")
    axes = [axis % x.ndim for axis in node.get("axes") or range(x.ndim)]
    y = x
    for index, axis in enumerate(axes):
        size = x.shape[axis]
        if sizes is not None and len(sizes):
            target = as_ints(sizes)[index]
            scale = target / size
        else:
            assert scales is not None
            scale = float(scales[index])
            target = int(np.floor(size * scale))
        if target != size or scale != 1.0:
            y = _along(y, axis, *_taps(node, size, target, scale, mapping))
    return y


@register("Upsample", jvp=linear, shaping=range(1, 2))
def _upsample(node: Node, x: Array, scales: Array | None = None) -> Array:
    factors = node.get("scales") if scales is None else scales
    y = x
    for axis, scale in enumerate(factors):
        target = int(np.floor(x.shape[axis] * float(scale)))
        if target != x.shape[axis]:
            y = _along(y, axis, *_taps(node, x.shape[axis], target, float(scale), "asymmetric"))
    return y


def _along(x: Array, axis: int, places: Array, weights: Array | None) -> Array:
    """The elements at `places` (taps, target) along an axis, times `weights`, summed over the taps."""
    if weights is None:
        return np.take(x, places[0], axis=axis)
    shape = [-1 if other == axis else 1 for other in range(x.ndim)]
    weights = weights.astype(x.dtype)
    y = np.take(x, places[0], axis=axis) * weights[0].reshape(shape)
    for place, weight in zip(places[1:], weights[1:], strict=True):
        y += np.take(x, place, axis=axis) * weight.reshape(shape)
    return y


def _positions(node: Node, size: int, target: int, scale: float, mapping: str) -> Array:
    """Position in the input of each element of the result."""
    out = np.arange(target, dtype=np.float64)
    if mapping == "asymmetric":
        return out / scale
    if mapping == "align_corners":
        return out * ((size - 1) / (target - 1)) if target > 1 else np.zeros(target)
    if mapping == "pytorch_half_pixel" and target == 1:
        return np.zeros(target)
    if mapping in ("half_pixel", "pytorch_half_pixel"):
        return (out + 0.5) / scale - 0.5
    if mapping == "half_pixel_symmetric":
        adjustment = target / (scale * size)
        return size / 2 * (1 - adjustment) + (out + 0.5) / scale - 0.5
    raise unsupported(node, f"the coordinate transformation {mapping!r} is not implemented")


def _taps(node: Node, size: int, target: int, scale: float, mapping: str) -> tuple[Array, Array | None]:
    """Which elements of an axis make each element of the result, and their weights (None: 1)."""
    position, mode = _positions(node, size, target, scale, mapping), node.get("mode", "nearest")
    if mode == "nearest":
        rounding = node.get("nearest_mode", "floor" if node.opset < 11 else "round_prefer_floor")
        rounds: dict[str, Any] = {
            "floor": np.floor,
            "ceil": np.ceil,
            "round_prefer_floor": lambda p: np.ceil(p - 0.5),
            "round_prefer_ceil": lambda p: np.floor(p + 0.5),
        }
        return np.clip(rounds[rounding](position), 0, size - 1).astype(np.int64)[None], None
    widening = 1.0 / scale if node.get("antialias", 0) and scale < 1 else 1.0  # of the filter
    radius = (2 if mode == "cubic" else 1) * widening
    base = np.floor(position)
    offsets = np.arange(1 - int(np.ceil(radius)), int(np.ceil(radius)) + 1, dtype=np.float64)
    if widening > 1:
        offsets = np.arange(-int(np.ceil(radius)), int(np.ceil(radius)) + 2, dtype=np.float64)
    places = base[None] + offsets[:, None]
    distance = np.abs(places - position[None]) / widening
    weights = _cubic(distance, node.get("cubic_coeff_a", -0.75)) if mode == "cubic" else np.maximum(1 - distance, 0)
    if node.get("exclude_outside", 0):
        weights = np.where((places < 0) | (places > size - 1), 0, weights)
    if node.get("exclude_outside", 0) or widening > 1:
        weights = weights / weights.sum(axis=0)
    return np.clip(places, 0, size - 1).astype(np.int64), weights


def _cubic(distance: Array, a: float) -> Array:
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _grid_sample_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    (x, grid), (dx, dgrid) = inputs, tangents
    change: Any = 0.0
    if dx is not None:
        change = _grid_sample(node, dx, grid)
    if dgrid is not None and _grid_mode(node) == "linear":
        change = change + _sampled(node, x, grid, dgrid)
    return change


@register("GridSample", jvp=_grid_sample_jvp)
def _grid_sample(node: Node, x: Array, grid: Array) -> Array:
    return _sampled(node, x, grid, None)


def _grid_mode(node: Node) -> str:
    mode = node.get("mode", "linear")
    mode = "linear" if mode == "bilinear" else mode
    if mode not in ("linear", "nearest"):
        raise unsupported(node, f"mode {mode!r} is not implemented")
    return str(mode)


def _sampled(node: Node, x: Array, grid: Array, moved: Array | None) -> Array:
    """`x` (N, C, H, W) at the places of `grid` (N, H', W', 2), or how that changes when the grid does by `moved`."""
    if x.ndim != 4:
        raise unsupported(node, f"an input of rank {x.ndim} is not implemented")
    aligned, padding = bool(node.get("align_corners", 0)), node.get("padding_mode", "zeros")
    places, slopes = [], []
    for component, size in ((1, x.shape[2]), (0, x.shape[3])):
        position, slope = _place(grid[..., component], size, aligned=aligned, padding=padding)
        places.append(position)
        slopes.append(slope)
    if _grid_mode(node) == "nearest":
        return _picked(x, *(np.rint(position) for position in places))
    (y, x_), (top, left) = places, (np.floor(position) for position in places)
    fy, fx = (y - top)[:, None], (x_ - left)[:, None]
    corners = [_picked(x, top + dy, left + dx) for dy in (0, 1) for dx in (0, 1)]
    if moved is None:
        upper = corners[0] * (1 - fx) + corners[1] * fx
        lower = corners[2] * (1 - fx) + corners[3] * fx
        return upper * (1 - fy) + lower * fy
    my, mx = (slopes[0] * moved[..., 1])[:, None], (slopes[1] * moved[..., 0])[:, None]
    by_y = (corners[2] - corners[0]) * (1 - fx) + (corners[3] - corners[1]) * fx
    by_x = (corners[1] - corners[0]) * (1 - fy) + (corners[3] - corners[2]) * fy
    change: Array = by_y * my + by_x * mx
    return change


def _place(coordinate: Array, size: int, *, aligned: bool, padding: str) -> tuple[Array, Array]:
    """The place along an axis of `size` elements for a coordinate in [-1, 1], and its derivative."""
    scale = (size - 1) / 2 if aligned else size / 2
    place = (coordinate + 1) * scale if aligned else (coordinate + 1) * scale - 0.5
    slope = np.full_like(place, scale)
    if padding == "reflection":
        low, high = (0.0, size - 1.0) if aligned else (-0.5, size - 0.5)
        span = high - low
        turns = (place - low) / span if span else np.zeros_like(place)
        odd = np.floor(turns) % 2 != 0
        within = (turns - np.floor(turns)) * span
        place, slope = low + np.where(odd, span - within, within), np.where(odd, -slope, slope)
    if padding in ("border", "reflection"):
        inside = (place >= 0) & (place <= size - 1)
        place, slope = np.clip(place, 0, size - 1), np.where(inside, slope, 0)
    return place, slope


def _picked(x: Array, row: Array, column: Array) -> Array:
    """Elements of `x` (N, C, H, W) at whole places (N, H', W'); 0 outside."""
    height, width = x.shape[2:]
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    rows = np.where(inside, row, 0).astype(np.int64)
    columns = np.where(inside, column, 0).astype(np.int64)
    batch = np.arange(x.shape[0]).reshape(-1, 1, 1)
    picked = x[batch, :, rows, columns]  # (N, H', W', C)
    return np.where(inside[:, None], np.moveaxis(picked, -1, 1), x.dtype.type(0))
