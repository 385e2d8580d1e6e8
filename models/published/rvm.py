"""Recurrent decoder of Robust Video Matting (Lin et al. 2021, arXiv 2108.11515) as a step model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec
from stepcell.dims import Dim
from stepcell.models.cells import ConvGRUCell

__all__ = ["RecurrentDecoder", "decoder_states"]

_RGB = 3


def _scaled(size: str, by: int) -> str:
    """Expression for the size after log2(by) halvings, each rounded up."""
    return f"({size} + {by - 1}) // {by}"


def decoder_states(
    bottleneck: int, decoder_channels: Sequence[int], height: str = "height", width: str = "width"
) -> list[StateSpec]:
    """States r1 to r4 for an image of this size: half of the channels, at 1/2, 1/4, 1/8 and 1/16 of the size."""
    channels = [decoder_channels[2], decoder_channels[1], decoder_channels[0], bottleneck]
    return [
        StateSpec(name=f"r{level}", shape=("batch", size // 2, _scaled(height, 2**level), _scaled(width, 2**level)))
        for level, size in enumerate(channels, start=1)
    ]


class _Bottleneck(nn.Module):
    """ConvGRU on the second half of the channels; the first half is passed through."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gru = ConvGRUCell(channels // 2, channels // 2, 3)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        passed, remembered = x.chunk(2, dim=1)
        remembered, r_next = self.gru(remembered, r)
        return torch.cat([passed, remembered], dim=1), r_next


class _Up(nn.Module):
    """Upsampling by 2, cropped to the image at this level and concatenated with feature and image."""

    def __init__(self, below: int, feature: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(below + feature + _RGB, channels, 3, padding=1)
        self.memory = _Bottleneck(channels)

    def forward(self, x: Tensor, feature: Tensor, image: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv(torch.cat([_upsampled(x, image), feature, image], dim=1)))
        x, r_next = self.memory(x, r)
        return x, r_next


class RecurrentDecoder(nn.Module):
    """Step model: image s0 and features f1 to f4 at 1/2 to 1/16 of it, rounded up -> y at full size.

    Args:
        feature_channels: channels of f1 to f4; that of f4 is even.
        decoder_channels: channels after the levels at 1/8, 1/4, 1/2 and 1 of the size; the first three
            are even.

    Raises:
        ValueError: not four of each, or an odd number of channels in front of a ConvGRU.
    """

    def __init__(self, feature_channels: Sequence[int], decoder_channels: Sequence[int]) -> None:
        super().__init__()
        for name, sizes in (("feature_channels", feature_channels), ("decoder_channels", decoder_channels)):
            if len(sizes) != 4:
                raise ValueError(f"{name}: expected four, got {list(sizes)}")
        if any(size % 2 for size in (feature_channels[3], *decoder_channels[:3])):
            raise ValueError(
                "feature_channels, decoder_channels: expected even numbers for f4 and the first three of the decoder "
                f"(a ConvGRU takes half of them), got {list(feature_channels)} and {list(decoder_channels)}"
            )
        shapes: list[tuple[Dim, ...]] = [("batch", _RGB, "height", "width")]
        for level, size in enumerate(feature_channels, start=1):
            shapes.append(("batch", size, _scaled("height", 2**level), _scaled("width", 2**level)))
        names = ["s0", "f1", "f2", "f3", "f4"]
        self.inputs = [
            TensorSpec(name=name, shape=shape, layout="NCHW") for name, shape in zip(names, shapes, strict=True)
        ]
        self.outputs = [TensorSpec(name="y", shape=("batch", decoder_channels[3], "height", "width"), layout="NCHW")]
        self.states = decoder_states(feature_channels[3], decoder_channels)
        f1, f2, f3, f4 = feature_channels
        d3, d2, d1, d0 = decoder_channels
        self.decode4 = _Bottleneck(f4)
        self.decode3 = _Up(f4, f3, d3)
        self.decode2 = _Up(d3, f2, d2)
        self.decode1 = _Up(d2, f1, d1)
        self.decode0 = nn.ModuleList([nn.Conv2d(d1 + _RGB, d0, 3, padding=1), nn.Conv2d(d0, d0, 3, padding=1)])

    def forward(
        self,
        s0: Tensor,
        f1: Tensor,
        f2: Tensor,
        f3: Tensor,
        f4: Tensor,
        r1: Tensor,
        r2: Tensor,
        r3: Tensor,
        r4: Tensor,
    ) -> tuple[Tensor, ...]:
        s1 = _halved(s0)
        s2 = _halved(s1)
        s3 = _halved(s2)
        x, r4 = self.decode4(f4, r4)
        x, r3 = self.decode3(x, f3, s3, r3)
        x, r2 = self.decode2(x, f2, s2, r2)
        x, r1 = self.decode1(x, f1, s1, r1)
        x = torch.cat([_upsampled(x, s0), s0], dim=1)
        for conv in self.decode0:
            x = F.relu(conv(x))
        return x, r1, r2, r3, r4


def _halved(image: Tensor) -> Tensor:
    return F.avg_pool2d(image, 2, 2, ceil_mode=True, count_include_pad=False)


def _upsampled(x: Tensor, like: Tensor) -> Tensor:
    # Cropped after doubling: resizing directly to an odd size would sample at other positions.
    x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    return x[:, :, : like.shape[2], : like.shape[3]]
