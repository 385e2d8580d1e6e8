"""Peers that the kernels are compared with: the same step in torch, written as usual.

Every peer is built from one cell and its weights, and steps float16 tensors (B, C, H, W) in channels-last memory. Soft
gates, no peepholes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_cases import States, Step, Weights
from torch import Tensor

from stepcell.plugins.kernels.cell_config import CellConfig

__all__ = ["convolutions_alone", "peers_of"]

Build = Callable[[CellConfig, Weights], Step]
Convolution = Callable[[Tensor], Tensor]


def fewest_convolutions(cell: CellConfig, weights: Weights) -> Step:
    """Weights of the same operand in one convolution, as Robust Video Matting writes its cell."""
    convolutions = _convolutions(cell, weights)

    def before(x: Tensor, states: States) -> States:
        (h,) = states
        z, r = torch.sigmoid(convolutions[0](torch.cat([x, h], 1))).chunk(2, 1)
        n = torch.tanh(convolutions[1](torch.cat([x, r * h], 1)))
        return ((1 - z) * h + z * n,)

    def after(x: Tensor, states: States) -> States:
        (h,) = states
        (a_z, a_r, a_n), (g_z, g_r, g_n) = (f(v).chunk(3, 1) for f, v in zip(convolutions, (x, h), strict=True))
        z, r = torch.sigmoid(a_z + g_z), torch.sigmoid(a_r + g_r)
        return ((1 - z) * h + z * torch.tanh(a_n + r * g_n),)

    def lstm(x: Tensor, states: States) -> States:
        h, c = states
        i, f, o, g = convolutions[0](torch.cat([x, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    return {"before": before, "after": after}.get(cell.variant, lstm)


def convolution_per_gate(cell: CellConfig, weights: Weights) -> Step:
    """The formulation of RAFT's ConvGRU (reset "before")."""
    z_and_r, candidate = _joined(weights)
    w_z, w_r = z_and_r.chunk(2)
    b_z, b_r, b_n = weights["b"].chunk(3)
    to_z, to_r, to_n = (_convolution(cell, w, b) for w, b in ((w_z, b_z), (w_r, b_r), (candidate, b_n)))

    def step(x: Tensor, states: States) -> States:
        (h,) = states
        xh = torch.cat([x, h], 1)
        z, r = torch.sigmoid(to_z(xh)), torch.sigmoid(to_r(xh))
        n = torch.tanh(to_n(torch.cat([x, r * h], 1)))
        return ((1 - z) * h + z * n,)

    return step


def compiled(cell: CellConfig, weights: Weights) -> Step:
    """torch.compile with max-autotune; the graph is captured outside, as for all others."""
    step: Step = torch.compile(fewest_convolutions(cell, weights), mode="max-autotune-no-cudagraphs", dynamic=False)
    return step


def fused_pointwise(cell: CellConfig, weights: Weights) -> Step:
    """Convolutions of cuDNN with one fused pointwise kernel after each: the strongest honest baseline.

    The kernels work on channels-last memory directly; r . h is written into the operand of the second
    convolution, so the concatenation is done once.
    """
    import kernel_pointwise as fused  # needs Triton, the other peers do not

    convolutions, C, CX, block = _convolutions(cell, weights), cell.hidden, cell.inputs, 1024

    def before(x: Tensor, states: States) -> States:
        (h,) = states
        xh = torch.cat([x, h], 1)
        a = convolutions[0](xh)
        z, out = torch.empty_like(h), torch.empty_like(h)
        grid = (-(-h.numel() // block),)
        fused.reset[grid](a, h, xh, z, h.numel() // C, C, CX, block)
        fused.blend[grid](convolutions[1](xh), h, z, out, h.numel(), block)
        return (out,)

    def after(x: Tensor, states: States) -> States:
        (h,) = states
        out = torch.empty_like(h)
        grid = (-(-h.numel() // block),)
        fused.after[grid](convolutions[0](x), convolutions[1](h), h, out, h.numel() // C, C, block)
        return (out,)

    def lstm(x: Tensor, states: States) -> States:
        h, c = states
        out, cell_out = torch.empty_like(h), torch.empty_like(c)
        grid = (-(-h.numel() // block),)
        fused.lstm[grid](convolutions[0](torch.cat([x, h], 1)), c, out, cell_out, h.numel() // C, C, block)
        return out, cell_out

    return {"before": before, "after": after}.get(cell.variant, lstm)


def convolutions_alone(cell: CellConfig, weights: Weights) -> Step:
    """Only the convolutions, with their operands prepared: a bound for everything that uses these convolutions."""
    convolutions = _convolutions(cell, weights)
    operands: list[Tensor] = []

    def step(x: Tensor, states: States) -> States:
        if not operands:
            both = torch.cat([x, states[0]], 1)
            operands.extend({"before": (both, both), "after": (x, states[0])}.get(cell.variant, (both,)))
        for convolution, operand in zip(convolutions, operands, strict=True):
            convolution(operand)
        return states

    return step


def peers_of(cell: CellConfig) -> dict[str, Build]:
    """The peers that can compute this variant of cell."""
    peers: dict[str, Build] = {
        "torch, fewest convolutions": fewest_convolutions,
        "torch, a convolution per gate": convolution_per_gate,
        "torch.compile max-autotune": compiled,
        "cuDNN convolutions, fused pointwise": fused_pointwise,
    }
    if cell.variant != "before":
        del peers["torch, a convolution per gate"]
    return peers


def _joined(weights: Weights) -> tuple[Tensor, Tensor]:
    """Weights of the convolutions over concat(x, h): both gates, and the candidate."""
    two_c = len(weights["W_h"])
    gates = torch.cat([weights["W_x"][:two_c], weights["W_h"]], 1)
    return gates, torch.cat([weights["W_x"][two_c:], weights["W_n"]], 1)


def _convolutions(cell: CellConfig, weights: Weights) -> list[Convolution]:
    """The convolutions of a step in the formulation with the fewest.

    Reset "before": over concat(x, h) and concat(x, r . h); "after": over x and over h; ConvLSTM: over concat(x, h).
    """
    bias = weights["b"]
    if cell.variant == "before":
        gates, candidate = _joined(weights)
        split = 2 * cell.hidden
        return [_convolution(cell, gates, bias[:split]), _convolution(cell, candidate, bias[split:])]
    if cell.variant == "after":
        bias_h = torch.cat([bias.new_zeros(2 * cell.hidden), weights["b_hn"]])
        hidden = torch.cat([weights["W_h"], weights["W_n"]])
        return [_convolution(cell, weights["W_x"], bias), _convolution(cell, hidden, bias_h)]
    return [_convolution(cell, torch.cat([weights["W_x"], weights["W_h"]], 1), bias)]


def _convolution(cell: CellConfig, weight: Tensor, bias: Tensor) -> Convolution:
    weight, padding = weight.contiguous(memory_format=torch.channels_last), (cell.kernel[0] // 2, cell.kernel[1] // 2)
    return lambda operand: F.conv2d(operand, weight, bias, padding=padding)
