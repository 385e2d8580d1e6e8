"""Kernel that converts a float32 state to its fp16 mirror, which the convolutions read."""

from __future__ import annotations

import triton.language as tl

from stepcell.plugins.kernels.triton.epilogue import load_state, store_map
from stepcell.plugins.kernels.triton.language import jit

__all__ = ["narrow_state"]


@jit
def narrow_state(
    state: tl.tensor,  # float32 (B, C, H, W)
    h_out: tl.tensor,  # float16 (B, H, W, LDC)
    H: tl.tensor,
    W: tl.tensor,
    P: tl.tensor,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Convert to float16, channels last. Not needed if the caller has y of the last step, which is this mirror."""
    LDC: tl.constexpr = (C + 7) // 8 * 8
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    value = load_state(state, pixel, pixel < P, channel, H * W, C, LDC, WIDE=True)
    store_map(h_out, value, pixel, pixel < P, channel, C, LDC)
