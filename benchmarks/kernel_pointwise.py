"""The pointwise halves of a ConvGRU step, for the peer that leaves the convolutions to cuDNN."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["blend", "reset"]


@triton.jit
def reset(
    a,  # half (pixels, 2C): gates z, r before their activation
    h,  # half (pixels, C)
    xh,  # half (pixels, CX + C): x and h; h is replaced by r . h
    z,  # half (pixels, C), written
    pixels,
    C: tl.constexpr,
    CX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both gates: z = sigmoid(a_z), and r . h straight into the operand of the second convolution."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels * C
    pixel, c = i // C, i % C
    row = a + pixel * (2 * C) + c
    old = tl.load(h + i, mask=inside, other=0.0).to(tl.float32)
    gate_z = 1.0 / (1.0 + tl.exp(-tl.load(row, mask=inside, other=0.0).to(tl.float32)))
    gate_r = 1.0 / (1.0 + tl.exp(-tl.load(row + C, mask=inside, other=0.0).to(tl.float32)))
    tl.store(z + i, gate_z.to(tl.float16), mask=inside)
    tl.store(xh + pixel * (CX + C) + CX + c, (gate_r * old).to(tl.float16), mask=inside)


@triton.jit
def blend(
    a,  # half (size): the candidate before its activation
    h,
    z,
    out,
    size,
    BLOCK: tl.constexpr,
):
    """The new state: h + z . (tanh(a) - h)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    old = tl.load(h + i, mask=inside, other=0.0).to(tl.float32)
    n = 2.0 / (1.0 + tl.exp(-2.0 * tl.load(a + i, mask=inside, other=0.0).to(tl.float32))) - 1.0
    new = old + tl.load(z + i, mask=inside, other=0.0).to(tl.float32) * (n - old)
    tl.store(out + i, new.to(tl.float16), mask=inside)
