"""Epilogue of the kernels: activations, and loads and stores of maps and states.

There are two layouts. Float16 maps are (B, H, W, LD), where LD is the channels rounded up to 8. A wide state is
float32 (B, C, H, W); it is read and written as a (channel, pixel) tile, so that accesses of neighbouring threads
coalesce, and transposed through registers and shared memory.

Offsets are int32, which saves registers; the launcher refuses maps of 2^31 values or more.
"""

from __future__ import annotations

import triton.language as tl

from stepcell.plugins.kernels.triton.language import jit

__all__ = ["load_map", "load_state", "sigmoid", "store_map", "store_state", "tanh"]


@jit
def sigmoid(x: tl.tensor, HARD: tl.constexpr) -> tl.tensor:
    """1 / (1 + exp(-x)), or clamp(x/2 + 1/2, 0, 1). NaN is propagated, so that broken inputs are noticed."""
    return _clamp(0.5 * x + 0.5, 0.0, 1.0) if HARD else 1.0 / (1.0 + tl.exp(-x))


@jit
def tanh(x: tl.tensor, HARD: tl.constexpr) -> tl.tensor:
    """2 sigmoid(2x) - 1, which saturates at both ends without overflow, or clamp(x, -1, 1)."""
    return _clamp(x, -1.0, 1.0) if HARD else 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@jit
def _clamp(x: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    above = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)


@jit
def load_map(
    src: tl.tensor, pixel: tl.tensor, exists: tl.tensor, channel: tl.tensor, C: tl.constexpr, LD: tl.constexpr
) -> tl.tensor:
    """Tile (pixel, channel) of a float16 map, as float32; channels from C on are 0."""
    offset = pixel[:, None] * LD + channel[None, :]
    return tl.load(src + offset, mask=exists[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)


@jit
def store_map(
    dst: tl.tensor,
    value: tl.tensor,
    pixel: tl.tensor,
    exists: tl.tensor,
    channel: tl.tensor,
    C: tl.constexpr,
    LD: tl.constexpr,
) -> None:
    """Store a tile into a float16 map, with zeros in the padding channels C to LD - 1.

    The next layer multiplies them by zero weights; 0 * NaN would be NaN.
    """
    offset = pixel[:, None] * LD + channel[None, :]
    value = tl.where((channel < C)[None, :], value, 0.0)
    tl.store(dst + offset, value.to(tl.float16), mask=exists[:, None] & (channel < LD)[None, :])


@jit
def _wide_offset(pixel: tl.tensor, channel: tl.tensor, HW: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """(channel, pixel) offsets into (B, C, H, W); `pixel` counts through B, H and W."""
    image = pixel // HW
    return (pixel + image * ((C - 1) * HW))[None, :] + channel[:, None] * HW


@jit
def load_state(
    src: tl.tensor,
    pixel: tl.tensor,
    exists: tl.tensor,
    channel: tl.tensor,
    HW: tl.tensor,
    C: tl.constexpr,
    LD: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Tile (pixel, channel) of the state as float32: float32 (B, C, H, W) if WIDE, else a float16 map."""
    if WIDE:
        mask = (channel < C)[:, None] & exists[None, :]
        tile = tl.trans(tl.load(src + _wide_offset(pixel, channel, HW, C), mask=mask, other=0.0))
    else:
        tile = load_map(src, pixel, exists, channel, C, LD)
    return tile


@jit
def store_state(
    dst: tl.tensor,
    value: tl.tensor,
    pixel: tl.tensor,
    exists: tl.tensor,
    channel: tl.tensor,
    HW: tl.tensor,
    C: tl.constexpr,
    LD: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Store the (pixel, channel) tile of a state that `load_state` reads."""
    if WIDE:
        mask = (channel < C)[:, None] & exists[None, :]
        tl.store(dst + _wide_offset(pixel, channel, HW, C), tl.trans(value), mask=mask)
    else:
        store_map(dst, value, pixel, exists, channel, C, LD)
