"""ConvGRU kernels: one step in two launches (reset "before") or one (reset "after").

Reset "before" needs two launches: the candidate convolves r . h, which must be complete at a pixel's neighbours.
A program computes BM pixels and BC channels of every gate. Equations: docs/op-contract.md.

Shapes: float16 maps x (B, H, W, LDX), h, z, rh, y (B, H, W, LDC), pre (B, H, W, LDP) with
LDX, LDC, LDP = CX, C, 3C rounded up to 8. state (B, C, H, W) float32 if WIDE, else a float16 map.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stepcell.plugins.kernels.triton.conv import accumulate, accumulate_two, pixel_block
from stepcell.plugins.kernels.triton.epilogue import load_map, load_state, sigmoid, store_map, store_state, tanh
from stepcell.plugins.kernels.triton.language import jit
from stepcell.plugins.kernels.triton.split import arrived_last, store_partial, sum_partials

__all__ = ["gru_after", "gru_candidate", "gru_gates"]


@jit
def gru_gates(
    x: tl.tensor,
    h: tl.tensor,  # fp16 mirror of the state
    pre: tl.tensor,  # float16 pre-activations to add, gates z, r, n; not read unless HAS_PRE
    wx: tl.tensor,  # packed, columns z, r of every channel in turn
    wh: tl.tensor,
    bias: tl.tensor,  # float32, ordered like the columns
    state: tl.tensor,
    z_out: tl.tensor,
    rh_out: tl.tensor,
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
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED_STAGES: tl.constexpr,  # stages of a loop that masks padding channels (conv.py)
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launch 2 may start before this one is done
) -> None:
    """Launch 1 of 2: z = sigmoid(a_z + g_z) and r . h with r = sigmoid(a_r + g_r)."""
    LDC: tl.constexpr = (C + 7) // 8 * 8
    LDN: tl.constexpr = (2 * C + 7) // 8 * 8
    LDP: tl.constexpr = (3 * C + 7) // 8 * 8
    X_STAGES: tl.constexpr = STAGES if CX % 8 == 0 else RAGGED_STAGES
    H_STAGES: tl.constexpr = (
        STAGES if WIDE or C % 8 == 0 else RAGGED_STAGES
    )  # the mirror of a wide state has zero padding
    pixel, exists, row, column = pixel_block(H, W, P, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    columns = tl.program_id(1) * (2 * BC) + tl.arange(0, 2 * BC)
    if OVERLAP:
        gdc_launch_dependents()  # takes effect once all programs are here or done; launch 2 waits for our writes

    acc = tl.full((BM, 2 * BC), 0.0, tl.float32)
    if CX > 0:
        acc = accumulate(acc, x, wx, columns, pixel, exists, row, column, H, W, CX, LDN, KH, KW, BK, X_STAGES, SPLITS)
    acc = accumulate(
        acc, h, wh, columns, pixel, exists, row, column, H, W, C, LDN, KH, KW, BK, H_STAGES, SPLITS, CLEAN=WIDE
    )
    if SPLITS > 1:
        store_partial(acc, partials, 0, 2 * BC, SPLITS)
        if not arrived_last(arrivals, SPLITS):
            return
        acc = sum_partials(acc, partials, 0, 2 * BC, SPLITS)
    acc += tl.load(bias + columns)[None, :]
    a_z, a_r = tl.split(tl.reshape(acc, (BM, BC, 2)))
    if HAS_PRE:
        a_z += load_map(pre, pixel, exists, channel, C, LDP)
        a_r += load_map(pre + C, pixel, exists, channel, C, LDP)

    store_map(z_out, sigmoid(a_z, HARD), pixel, exists, channel, C, LDC)
    old = load_state(state, pixel, exists, channel, H * W, C, LDC, WIDE)
    store_map(rh_out, sigmoid(a_r, HARD) * old, pixel, exists, channel, C, LDC)


@jit
def gru_candidate(
    x: tl.tensor,
    rh: tl.tensor,
    pre: tl.tensor,
    wx: tl.tensor,  # packed, one column per channel
    wh: tl.tensor,
    bias: tl.tensor,
    z: tl.tensor,
    state: tl.tensor,
    state_out: tl.tensor,
    y_out: tl.tensor,
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
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED_STAGES: tl.constexpr,  # stages of a loop that masks padding channels (conv.py)
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launch 1 may still run
) -> None:
    """Launch 2 of 2: n = tanh(a_n + W_n * (r . h)), h' = h + z . (n - h).

    The state is read only at the program's own pixels, so state_out may be state itself.
    """
    LDC: tl.constexpr = (C + 7) // 8 * 8
    LDP: tl.constexpr = (3 * C + 7) // 8 * 8
    X_STAGES: tl.constexpr = STAGES if CX % 8 == 0 else RAGGED_STAGES
    pixel, exists, row, column = pixel_block(H, W, P, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)

    acc = tl.full((BM, BC), 0.0, tl.float32)
    if CX > 0:
        acc = accumulate(acc, x, wx, channel, pixel, exists, row, column, H, W, CX, LDC, KH, KW, BK, X_STAGES, SPLITS)
    if OVERLAP:
        # Only x and weights are read before this point. After it come r . h and z, which launch 1 writes, the
        # partial sums, whose memory it uses too, and all outputs.
        gdc_wait()
    acc = accumulate(
        acc, rh, wh, channel, pixel, exists, row, column, H, W, C, LDC, KH, KW, BK, STAGES, SPLITS, CLEAN=True
    )
    if SPLITS > 1:
        store_partial(acc, partials, 0, BC, SPLITS)
        if not arrived_last(arrivals, SPLITS):
            return
        acc = sum_partials(acc, partials, 0, BC, SPLITS)
    acc += tl.load(bias + channel)[None, :]
    if HAS_PRE:
        acc += load_map(pre + 2 * C, pixel, exists, channel, C, LDP)

    old = load_state(state, pixel, exists, channel, H * W, C, LDC, WIDE)
    new = old + load_map(z, pixel, exists, channel, C, LDC) * (tanh(acc, HARD) - old)
    store_state(state_out, new, pixel, exists, channel, H * W, C, LDC, WIDE)
    store_map(y_out, new, pixel, exists, channel, C, LDC)


@jit
def gru_after(
    x: tl.tensor,
    h: tl.tensor,
    pre: tl.tensor,
    wx: tl.tensor,  # packed, columns z, r of every channel in turn, then n of every channel
    wh: tl.tensor,
    bias: tl.tensor,  # like the columns, then b_hn of every channel
    state: tl.tensor,
    state_out: tl.tensor,
    y_out: tl.tensor,
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
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED_STAGES: tl.constexpr,  # stages of a loop that masks padding channels (conv.py)
    SPLITS: tl.constexpr,
) -> None:
    """The whole step: n = tanh(a_n + r . (W_n * h + b_hn)). state_out must not be state or h."""
    LDC: tl.constexpr = (C + 7) // 8 * 8
    LDG: tl.constexpr = (2 * C + 7) // 8 * 8  # first column of n
    LDN: tl.constexpr = LDG + LDC
    LDP: tl.constexpr = (3 * C + 7) // 8 * 8
    X_STAGES: tl.constexpr = STAGES if CX % 8 == 0 else RAGGED_STAGES
    H_STAGES: tl.constexpr = (
        STAGES if WIDE or C % 8 == 0 else RAGGED_STAGES
    )  # the mirror of a wide state has zero padding
    pixel, exists, row, column = pixel_block(H, W, P, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    gates = tl.program_id(1) * (2 * BC) + tl.arange(0, 2 * BC)
    of_n = LDG + channel

    acc = tl.full((BM, 2 * BC), 0.0, tl.float32)
    x_n = tl.full((BM, BC), 0.0, tl.float32)
    h_n = tl.full((BM, BC), 0.0, tl.float32)
    if CX > 0:
        acc, x_n = accumulate_two(
            acc, x_n, x, wx, gates, of_n, pixel, exists, row, column, H, W, CX, LDN, KH, KW, BK, X_STAGES, SPLITS
        )
    acc, h_n = accumulate_two(
        acc, h_n, h, wh, gates, of_n, pixel, exists, row, column, H, W, C, LDN, KH, KW, BK, H_STAGES, SPLITS, CLEAN=WIDE
    )
    if SPLITS > 1:
        store_partial(acc, partials, 0, 4 * BC, SPLITS)
        store_partial(x_n, partials, 2 * BC, 4 * BC, SPLITS)
        store_partial(h_n, partials, 3 * BC, 4 * BC, SPLITS)
        if not arrived_last(arrivals, SPLITS):
            return
        acc = sum_partials(acc, partials, 0, 4 * BC, SPLITS)
        x_n = sum_partials(x_n, partials, 2 * BC, 4 * BC, SPLITS)
        h_n = sum_partials(h_n, partials, 3 * BC, 4 * BC, SPLITS)
    acc += tl.load(bias + gates)[None, :]
    x_n += tl.load(bias + of_n)[None, :]
    h_n += tl.load(bias + LDN + channel)[None, :]
    a_z, a_r = tl.split(tl.reshape(acc, (BM, BC, 2)))
    if HAS_PRE:
        a_z += load_map(pre, pixel, exists, channel, C, LDP)
        a_r += load_map(pre + C, pixel, exists, channel, C, LDP)
        x_n += load_map(pre + 2 * C, pixel, exists, channel, C, LDP)

    n = tanh(x_n + sigmoid(a_r, HARD) * h_n, HARD)
    old = load_state(state, pixel, exists, channel, H * W, C, LDC, WIDE)
    new = old + sigmoid(a_z, HARD) * (n - old)
    store_state(state_out, new, pixel, exists, channel, H * W, C, LDC, WIDE)
    store_map(y_out, new, pixel, exists, channel, C, LDC)
