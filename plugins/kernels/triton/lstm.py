"""ConvLSTM kernel: one step in one launch (Shi et al. 2015; equations in docs/op-contract.md)."""

from __future__ import annotations

import triton.language as tl

from stepcell.plugins.kernels.triton.conv import accumulate, pixel_block
from stepcell.plugins.kernels.triton.epilogue import load_map, load_state, sigmoid, store_map, store_state, tanh
from stepcell.plugins.kernels.triton.language import jit
from stepcell.plugins.kernels.triton.split import arrived_last, store_partial, sum_partials

__all__ = ["lstm_step"]


@jit
def _peephole(
    w: tl.tensor,
    gate: tl.constexpr,  # i, f, o
    pixel: tl.tensor,
    exists: tl.tensor,
    channel: tl.tensor,
    HW: tl.tensor,
    C: tl.constexpr,
    MAP: tl.constexpr,
) -> tl.tensor:
    """Peephole weights of one gate: float32 (3, C), the same at every pixel, or (3, C, H, W) if MAP."""
    if MAP:
        one_image = pixel % HW
        weight = load_state(w + gate * C * HW, one_image, exists, channel, HW, C, C, WIDE=True)
    else:
        weight = tl.load(w + gate * C + channel, mask=channel < C, other=0.0)[None, :]
    return weight


@jit
def lstm_step(
    x: tl.tensor,  # float16 (B, H, W, LDX)
    h: tl.tensor,  # float16 (B, H, W, LDC), fp16 mirror of the state h
    pre: tl.tensor,  # float16 (B, H, W, LDP), gates i, f, o, g, to add; not read unless HAS_PRE
    wx: tl.tensor,  # packed, columns i, f, o, g of every channel in turn
    wh: tl.tensor,
    bias: tl.tensor,  # float32, ordered like the columns
    peephole: tl.tensor,  # float32 (3, C) or (3, C, H, W), i, f, o; not read unless PEEPHOLE
    cell: tl.tensor,  # (B, C, H, W) float32 if WIDE, else float16 (B, H, W, LDC)
    state_out: tl.tensor,  # h', like cell
    cell_out: tl.tensor,  # c', may be cell itself
    y_out: tl.tensor,  # h', float16 (B, H, W, LDC)
    partials: tl.tensor,
    arrivals: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    P: tl.tensor,
    CX: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    PEEPHOLE: tl.constexpr,  # 0: none, 1: per channel, 2: per channel and pixel
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED_STAGES: tl.constexpr,  # stages of a loop that masks padding channels (conv.py)
    SPLITS: tl.constexpr,
) -> None:
    """The whole step: c' = f . c + i . tanh(a_g), h' = o . tanh(c'). y_out and state_out must not be h."""
    LDC: tl.constexpr = (C + 7) // 8 * 8
    LDN: tl.constexpr = (4 * C + 7) // 8 * 8
    X_STAGES: tl.constexpr = STAGES if CX % 8 == 0 else RAGGED_STAGES
    H_STAGES: tl.constexpr = (
        STAGES if WIDE or C % 8 == 0 else RAGGED_STAGES
    )  # the mirror of a wide state has zero padding
    pixel, exists, row, column = pixel_block(H, W, P, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    columns = tl.program_id(1) * (4 * BC) + tl.arange(0, 4 * BC)

    acc = tl.full((BM, 4 * BC), 0.0, tl.float32)
    if CX > 0:
        acc = accumulate(acc, x, wx, columns, pixel, exists, row, column, H, W, CX, LDN, KH, KW, BK, X_STAGES, SPLITS)
    acc = accumulate(
        acc, h, wh, columns, pixel, exists, row, column, H, W, C, LDN, KH, KW, BK, H_STAGES, SPLITS, CLEAN=WIDE
    )
    if SPLITS > 1:
        store_partial(acc, partials, 0, 4 * BC, SPLITS)
        if not arrived_last(arrivals, SPLITS):
            return
        acc = sum_partials(acc, partials, 0, 4 * BC, SPLITS)
    acc += tl.load(bias + columns)[None, :]
    a_io, a_fg = tl.split(tl.reshape(acc, (BM, BC, 2, 2)))
    a_i, a_o = tl.split(a_io)
    a_f, a_g = tl.split(a_fg)
    if HAS_PRE:
        a_i += load_map(pre, pixel, exists, channel, C, LDN)
        a_f += load_map(pre + C, pixel, exists, channel, C, LDN)
        a_o += load_map(pre + 2 * C, pixel, exists, channel, C, LDN)
        a_g += load_map(pre + 3 * C, pixel, exists, channel, C, LDN)

    old = load_state(cell, pixel, exists, channel, H * W, C, LDC, WIDE)
    if PEEPHOLE > 0:
        a_i += _peephole(peephole, 0, pixel, exists, channel, H * W, C, PEEPHOLE == 2) * old
        a_f += _peephole(peephole, 1, pixel, exists, channel, H * W, C, PEEPHOLE == 2) * old
    new = sigmoid(a_f, HARD) * old + sigmoid(a_i, HARD) * tanh(a_g, HARD)
    if PEEPHOLE > 0:
        a_o += _peephole(peephole, 2, pixel, exists, channel, H * W, C, PEEPHOLE == 2) * new
    out = sigmoid(a_o, HARD) * tanh(new, HARD)
    store_state(cell_out, new, pixel, exists, channel, H * W, C, LDC, WIDE)
    store_state(state_out, out, pixel, exists, channel, H * W, C, LDC, WIDE)
    store_map(y_out, out, pixel, exists, channel, C, LDC)
