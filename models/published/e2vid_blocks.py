"""Building blocks of E2VID and FireNet: residual blocks, upsampling, recurrent blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.models.cells import ConvGRUCell, ConvLSTMCell

__all__ = ["BlockType", "FrameNorm", "Residual", "Upsample", "advance", "recurrent_block"]

BlockType = Literal["convgru", "convlstm"]


def recurrent_block(kind: BlockType, channels: int) -> ConvGRUCell | ConvLSTMCell:
    """3x3 cell with the same number of input and hidden channels."""
    if kind not in get_args(BlockType):
        raise ValueError(f"recurrent_block_type: expected 'convgru' or 'convlstm', got {kind!r}")
    return ConvGRUCell(channels, channels, 3) if kind == "convgru" else ConvLSTMCell(channels, channels, 3)


def advance(cell: nn.Module, x: Tensor, states: Sequence[Tensor], new_states: list[Tensor]) -> Tensor:
    """Run the next cell of a network on its part of `states`; appends its new states and returns its output."""
    assert isinstance(cell, (ConvGRUCell, ConvLSTMCell))
    first = len(new_states)
    results: tuple[Tensor, ...] = cell(x, *states[first : first + len(cell.states)])
    new_states.extend(results[1:])
    return results[0]


class FrameNorm(nn.Module):
    """Instance normalisation without weights, with the frame's statistics (Ulyanov et al. 2016, arXiv 1607.08022)."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        # Sums over a whole map exceed the range and precision of float16.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean((2, 3), keepdim=True)
        variance = (centred * centred).mean((2, 3), keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)


class Residual(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), 3x3.

    Args:
        frame_norm: whether norm is `FrameNorm`; other norms are folded into the convolutions.
    """

    def __init__(self, channels: int, *, frame_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = FrameNorm() if frame_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv1(x)))
        return F.relu(x + self.norm(self.conv2(features)))


class Upsample(nn.Module):
    """Upsampling by 2 with a 5x5 convolution and ReLU.

    Args:
        resize: whether to resize bilinearly and convolve; otherwise a transposed convolution is used.
    """

    def __init__(self, input_size: int, output_size: int, *, resize: bool) -> None:
        super().__init__()
        self.resize = resize
        self.conv: nn.Module = (
            nn.Conv2d(input_size, output_size, 5, padding=2)
            if resize
            else nn.ConvTranspose2d(input_size, output_size, 5, stride=2, padding=2, output_padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.resize:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return F.relu(self.conv(x))
