"""Convolution as an implicit matrix product: rows are pixels, columns are gate channels.

    acc[pixel, n] += sum over k of im2col(src)[pixel, k] * weight[k, n],  k = tap * LD + channel

`src` is a float16 map (B, H, W, LD), where LD is the channels rounded up to 8 (TensorRT's kHWC8), with zero
"same" padding. Its padding channels may hold anything, including NaN, unless these kernels wrote them: then they
are zero and the caller passes CLEAN. Otherwise each tile is masked, which sends it through registers. Triton 3.7
overwrites such registers while tensor cores still read them: on compute capability 9.0 (triton issue 9433), and on
10 and 11 in tensor memory, where two products share the tile. Such a loop needs STAGES = 1 (signature.py).
`weight` comes from packing.py. It is read past its last row and column, where it has zeros, so only pixels are masked.
"""

from __future__ import annotations

import triton.language as tl

from stepcell.plugins.kernels.triton.language import jit

__all__ = ["accumulate", "accumulate_two", "pixel_block"]


@jit
def pixel_block(
    H: tl.tensor, W: tl.tensor, P: tl.tensor, BM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Index, validity, row and column of the pixels of this program; P = B * H * W pixels are valid."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    return pixel, pixel < P, (pixel // W) % H, pixel % W


@jit
def _im2col(
    src: tl.tensor,
    t: tl.tensor,  # which block of BK values of k
    pixel: tl.tensor,
    exists: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    CIN: tl.constexpr,  # channels of src
    KH: tl.constexpr,
    KW: tl.constexpr,
    BK: tl.constexpr,
    CLEAN: tl.constexpr,
) -> tl.tensor:
    """The (BM, BK) tile of im2col(src) whose columns are k = t * BK ... t * BK + BK - 1."""
    LD: tl.constexpr = (CIN + 7) // 8 * 8
    base = src + pixel[:, None] * LD
    lane = tl.arange(0, BK)
    if LD % BK == 0:
        # A block is within one tap: it has a single offset, and masks are per pixel.
        tap = t // (LD // BK)
        dy = tap // KW - KH // 2
        dx = tap % KW - KW // 2
        inside = exists & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        first = (t % (LD // BK)) * BK
        channel = first + lane
        offset = (dy * W + dx) * LD + first
        tile = tl.load(base + (offset + lane)[None, :], mask=inside[:, None], other=0.0)
    else:
        # Few channels: a block covers several taps, so that no lanes are wasted on padding.
        k = t * BK + lane
        tap = k // LD
        dy = tap // KW - KH // 2
        dx = tap % KW - KW // 2
        y = row[:, None] + dy[None, :]
        x = column[:, None] + dx[None, :]
        inside = exists[:, None] & (tap < KH * KW)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        channel = k % LD
        offset = (dy * W + dx) * LD + channel
        tile = tl.load(base + offset[None, :], mask=inside, other=0.0)
    if CIN % 8 != 0 and not CLEAN:
        # Not part of the load's mask, which must be uniform over 16 bytes for vector loads.
        tile = tl.where((channel < CIN)[None, :], tile, 0.0)
    return tile


@jit
def accumulate(
    acc: tl.tensor,  # (BM, N) float32
    src: tl.tensor,
    weight: tl.tensor,
    columns: tl.tensor,  # (N): which columns of weight
    pixel: tl.tensor,
    exists: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    CIN: tl.constexpr,  # channels of src
    LDN: tl.constexpr,  # values from one row of weight to the next
    KH: tl.constexpr,
    KW: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the blocks of k
    CLEAN: tl.constexpr = False,  # padding channels of src are zero
) -> tl.tensor:
    """`acc` plus the convolution of src with these columns of weight, or one split's share of it."""
    blocks: tl.constexpr = (KH * KW * ((CIN + 7) // 8 * 8) + BK - 1) // BK
    weights = weight + tl.arange(0, BK)[:, None] * LDN + columns[None, :]
    first = tl.program_id(2) if SPLITS > 1 else 0
    # H >> 30 is 0, which the assembler does not know; otherwise it would unroll the whole loop and spill.
    for t in tl.range(first, blocks + (H >> 30), SPLITS, num_stages=STAGES):
        tile = _im2col(src, t, pixel, exists, row, column, H, W, CIN, KH, KW, BK, CLEAN)
        acc = tl.dot(tile, tl.load(weights + t * (BK * LDN)), acc)
    return acc


@jit
def accumulate_two(
    acc: tl.tensor,
    acc_two: tl.tensor,
    src: tl.tensor,
    weight: tl.tensor,
    columns: tl.tensor,
    columns_two: tl.tensor,
    pixel: tl.tensor,
    exists: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    CIN: tl.constexpr,  # channels of src
    LDN: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the blocks of k
    CLEAN: tl.constexpr = False,  # padding channels of src are zero
) -> tuple[tl.tensor, tl.tensor]:
    """`accumulate` for two sets of columns that share the tiles of src."""
    blocks: tl.constexpr = (KH * KW * ((CIN + 7) // 8 * 8) + BK - 1) // BK
    rows = weight + tl.arange(0, BK)[:, None] * LDN
    first = tl.program_id(2) if SPLITS > 1 else 0
    for t in tl.range(first, blocks + (H >> 30), SPLITS, num_stages=STAGES):
        tile = _im2col(src, t, pixel, exists, row, column, H, W, CIN, KH, KW, BK, CLEAN)
        acc = tl.dot(tile, tl.load(rows + columns[None, :] + t * (BK * LDN)), acc)
        acc_two = tl.dot(tile, tl.load(rows + columns_two[None, :] + t * (BK * LDN)), acc_two)
    return acc, acc_two
