"""What the kernels are compared with: the same ConvGRU step as others would run it.

Every peer is built from the op's weights and returns a function of (x, h) -> h', half tensors
(B, C, H, W) in channels-last memory; reset "before", soft gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PEERS", "Weights"]

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """W_x (3C, Cx, kh, kw), b (3C), W_h (2C, C, kh, kw), W_n (C, C, kh, kw), as the op has them."""

    x: Tensor
    b: Tensor
    h: Tensor
    n: Tensor

    @property
    def hidden(self) -> int:
        return self.n.shape[0]

    @property
    def padding(self) -> tuple[int, int]:
        return self.n.shape[2] // 2, self.n.shape[3] // 2

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights of a convolution over concat(x, h): gates and their bias, candidate and its bias."""
        two_c = 2 * self.hidden
        gates = torch.cat([self.x[:two_c], self.h], 1).contiguous(memory_format=torch.channels_last)
        candidate = torch.cat([self.x[two_c:], self.n], 1).contiguous(memory_format=torch.channels_last)
        return gates, self.b[:two_c], candidate, self.b[two_c:]


def two_convolutions(weights: Weights) -> Step:
    """Gates in one convolution, candidate in another, as Robust Video Matting writes it."""
    w_g, b_g, w_n, b_n = weights.joined()

    def step(x: Tensor, h: Tensor) -> Tensor:
        z, r = torch.sigmoid(F.conv2d(torch.cat([x, h], 1), w_g, b_g, padding=weights.padding)).chunk(2, 1)
        n = torch.tanh(F.conv2d(torch.cat([x, r * h], 1), w_n, b_n, padding=weights.padding))
        return (1 - z) * h + z * n

    return step


def three_convolutions(weights: Weights) -> Step:
    """A convolution per gate, as RAFT writes it."""
    w_g, b_g, w_n, b_n = weights.joined()
    (w_z, w_r), (b_z, b_r) = w_g.chunk(2), b_g.chunk(2)

    def step(x: Tensor, h: Tensor) -> Tensor:
        xh = torch.cat([x, h], 1)
        z = torch.sigmoid(F.conv2d(xh, w_z, b_z, padding=weights.padding))
        r = torch.sigmoid(F.conv2d(xh, w_r, b_r, padding=weights.padding))
        n = torch.tanh(F.conv2d(torch.cat([x, r * h], 1), w_n, b_n, padding=weights.padding))
        return (1 - z) * h + z * n

    return step


def convolutions_alone(weights: Weights) -> Step:
    """Only the two convolutions over ready-made operands: a bound for whatever uses these convolutions."""
    w_g, b_g, w_n, b_n = weights.joined()

    def step(x: Tensor, h: Tensor) -> Tensor:
        xh = torch.empty(
            (x.shape[0], x.shape[1] + h.shape[1], *x.shape[2:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        F.conv2d(xh, w_g, b_g, padding=weights.padding)
        return F.conv2d(xh, w_n, b_n, padding=weights.padding)

    return step


def compiled(weights: Weights) -> Step:
    """torch.compile with every choice timed; the graph is captured outside, as for all others."""
    step: Step = torch.compile(two_convolutions(weights), mode="max-autotune-no-cudagraphs", dynamic=False)
    return step


def fused_pointwise(weights: Weights) -> Step:
    """Convolutions of cuDNN with one fused pointwise kernel after each: the strongest honest baseline.

    The kernels work on channels-last memory as it lies; r . h goes straight into the operand of the
    second convolution, so the concatenation is done once.
    """
    from kernel_pointwise import blend, reset  # needs Triton, the other peers do not

    w_g, b_g, w_n, b_n = weights.joined()
    C, CX, block = weights.hidden, weights.x.shape[1], 1024

    def step(x: Tensor, h: Tensor) -> Tensor:
        xh = torch.cat([x, h], 1)
        a = F.conv2d(xh, w_g, b_g, padding=weights.padding)
        z, out = torch.empty_like(h), torch.empty_like(h)
        size = h.numel()
        grid = (-(-size // block),)
        reset[grid](a, h, xh, z, size // C, C, CX, block)
        a = F.conv2d(xh, w_n, b_n, padding=weights.padding)
        blend[grid](a, h, z, out, size, block)
        return out

    return step


# name -> (builder, whether it computes the step)
PEERS: dict[str, tuple[Callable[[Weights], Step], bool]] = {
    "torch, two convolutions": (two_convolutions, True),
    "torch, three convolutions": (three_convolutions, True),
    "torch.compile max-autotune": (compiled, True),
    "cuDNN convolutions, fused pointwise": (fused_pointwise, True),
    "cuDNN convolutions alone": (convolutions_alone, False),
}
