"""Pointwise parts of a step as Triton kernels, for the peer that uses cuDNN's convolutions.

Maps are float16, channels last: (pixels, channels). Gates are computed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["after", "blend", "lstm", "reset"]


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _wide(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def reset(
    a,  # (pixels, 2C): gates z, r before their activation
    h,  # (pixels, C)
    xh,  # (pixels, CX + C): x and h; h is replaced by r . h
    z,  # (pixels, C), written
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
    gate_r = _sigmoid(_wide(row + C, inside)) * _wide(h + i, inside)
    tl.store(z + i, _sigmoid(_wide(row, inside)).to(tl.float16), mask=inside)
    tl.store(xh + pixel * (CX + C) + CX + c, gate_r.to(tl.float16), mask=inside)


@triton.jit
def blend(
    a,  # (size): the candidate before its activation
    h,
    z,
    out,
    size,
    BLOCK: tl.constexpr,
):
    """The new state: h + z . (tanh(a) - h)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    old = _wide(h + i, inside)
    new = old + _wide(z + i, inside) * (_tanh(_wide(a + i, inside)) - old)
    tl.store(out + i, new.to(tl.float16), mask=inside)


@triton.jit
def after(
    a,  # (pixels, 3C): of x, gates z, r, n
    g,  # (pixels, 3C): of h
    h,
    out,
    pixels,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reset "after": n = tanh(a_n + r . g_n), h + z . (n - h)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels * C
    row = i // C * (3 * C) + i % C
    gate_z = _sigmoid(_wide(a + row, inside) + _wide(g + row, inside))
    gate_r = _sigmoid(_wide(a + row + C, inside) + _wide(g + row + C, inside))
    n = _tanh(_wide(a + row + 2 * C, inside) + gate_r * _wide(g + row + 2 * C, inside))
    old = _wide(h + i, inside)
    tl.store(out + i, (old + gate_z * (n - old)).to(tl.float16), mask=inside)


@triton.jit
def lstm(
    a,  # (pixels, 4C): gates i, f, o, g
    c,
    out,  # h'
    cell_out,  # c'
    pixels,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ConvLSTM: c' = f . c + i . tanh(g), h' = o . tanh(c')."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels * C
    row = a + i // C * (4 * C) + i % C
    keep = _sigmoid(_wide(row + C, inside)) * _wide(c + i, inside)
    new = keep + _sigmoid(_wide(row, inside)) * _tanh(_wide(row + 3 * C, inside))
    tl.store(cell_out + i, new.to(tl.float16), mask=inside)
    tl.store(out + i, (_sigmoid(_wide(row + 2 * C, inside)) * _tanh(new)).to(tl.float16), mask=inside)
