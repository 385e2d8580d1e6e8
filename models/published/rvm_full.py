"""Robust Video Matting with MobileNetV3 (Lin et al. 2021, arXiv 2108.11515) as a step model."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import TensorSpec
from stepcell.models.published.rvm import RecurrentDecoder, decoder_states

__all__ = ["BLOCKS", "MattingNetwork", "Refiner"]

# MobileNetV3-large (Howard et al. 2019, arXiv 1905.02244), last stage dilated instead of strided:
# inputs, kernel, expanded, outputs, squeeze channels or 0, hard-swish, stride, dilation.
BLOCKS = (
    (16, 3, 16, 16, 0, False, 1, 1),
    (16, 3, 64, 24, 0, False, 2, 1),
    (24, 3, 72, 24, 0, False, 1, 1),
    (24, 5, 72, 40, 24, False, 2, 1),
    (40, 5, 120, 40, 32, False, 1, 1),
    (40, 5, 120, 40, 32, False, 1, 1),
    (40, 3, 240, 80, 0, True, 2, 1),
    (80, 3, 200, 80, 0, True, 1, 1),
    (80, 3, 184, 80, 0, True, 1, 1),
    (80, 3, 184, 80, 0, True, 1, 1),
    (80, 3, 480, 112, 120, True, 1, 1),
    (112, 3, 672, 112, 168, True, 1, 1),
    (112, 5, 672, 160, 168, True, 1, 2),
    (160, 5, 960, 160, 240, True, 1, 2),
    (160, 5, 960, 160, 240, True, 1, 2),
)
_FEATURES = [16, 24, 40, 128]  # channels of f1 to f4; _DECODER: of the decoder
_DECODER = [80, 40, 32, 16]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LARGEST = 16384  # largest height or width for which the rounding of downsampled sizes is checked
_STEPS = 8  # values of float32 that are tried for the scale

RefinerKind = Literal["deep_guided_filter", "fast_guided_filter"]


class _Inverted(nn.Module):
    """Inverted residual block: expand, depthwise, squeeze-and-excitation, project; BatchNorm is folded."""

    def __init__(
        self, inputs: int, kernel: int, wide: int, outputs: int, squeeze: int, swish: bool, stride: int, dilation: int
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, wide, 1) if wide != inputs else None
        padding = kernel // 2 * dilation
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, padding, dilation, groups=wide)
        self.fc1 = nn.Conv2d(wide, squeeze, 1) if squeeze else None
        self.fc2 = nn.Conv2d(squeeze, wide, 1) if squeeze else None
        self.project = nn.Conv2d(wide, outputs, 1)
        self.activation = nn.Hardswish() if swish else nn.ReLU()
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.activation(self.depthwise(y))
        if self.fc1 is not None and self.fc2 is not None:
            squeezed = F.relu(self.fc1(y.mean((2, 3), keepdim=True)))
            y = y * F.hardsigmoid(self.fc2(squeezed))
        projected: Tensor = self.project(y)
        return x + projected if self.residual else projected


class _Backbone(nn.Module):
    """Features at 1/2, 1/4, 1/8 and, after LR-ASPP, 1/16 of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([_Inverted(*block) for block in BLOCKS])
        self.last = nn.Conv2d(160, 960, 1)
        self.aspp1 = nn.Conv2d(960, _FEATURES[3], 1)
        self.aspp2 = nn.Conv2d(960, _FEATURES[3], 1, bias=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        mean, std = (image.new_tensor(values).reshape(1, 3, 1, 1) for values in (_MEAN, _STD))
        x = F.hardswish(self.stem((image - mean) / std))
        taken = []
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index in (1, 3, 6):
                taken.append(x)
        x = F.hardswish(self.last(x))
        attention = torch.sigmoid(self.aspp2(x.mean((2, 3), keepdim=True)))
        return [*taken, F.relu(self.aspp1(x)) * attention]


class Refiner(nn.Module):
    """Guided filter (Wu et al. 2018, arXiv 1803.05619): upsamples the matte with a linear map of the image.

    The map is fitted at the small size. Its slopes are covariance / variance ("fast") or are computed from
    both and the decoder's features by a small network ("deep").
    """

    def __init__(self, kind: RefinerKind) -> None:
        super().__init__()
        self.box = nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=4)
        nn.init.constant_(self.box.weight, 1 / 9)
        deep = [nn.Conv2d(24, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
        self.slopes = nn.Sequential(*deep) if kind == "deep_guided_filter" else None

    def forward(self, large: Tensor, small: Tensor, matte: Tensor, features: Tensor) -> Tensor:
        compute, wide = large.dtype, torch.promote_types(large.dtype, torch.float32)

        def box(x: Tensor) -> Tensor:
            return F.conv2d(x, self.box.weight.to(wide), padding=1, groups=4)

        # A variance is a small difference of squares, which is lost in float16.
        x, y = _with_gray(small).to(wide), matte.to(wide)
        mean_x, mean_y = box(x), box(y)
        covariance, variance = box(x * y) - mean_x * mean_y, box(x * x) - mean_x * mean_x
        if self.slopes is None:
            a = covariance / (variance + 1e-5)
        else:
            a = self.slopes(torch.cat([covariance.to(compute), variance.to(compute), features], dim=1)).to(wide)
        size = (large.shape[2], large.shape[3])
        a, b = (
            F.interpolate(part.to(compute), size, mode="bilinear", align_corners=False)
            for part in (a, mean_y - a * mean_x)
        )
        return a * _with_gray(large) + b


class MattingNetwork(nn.Module):
    """Step model: src (RGB in 0..1) -> fgr (foreground), pha (alpha), all of one size; states r1 to r4.

    Args:
        refiner: filter that upsamples the matte to the full size; not used with a ratio of 1.
        downsample_ratio: scale at which the network works; the exact sizes are rounded down. (Upstream rounds the
            product in float64, which loses a pixel at a few sizes: 360 * 0.7 is 251 there, and 252 here.)

    Raises:
        ValueError: a ratio outside (0, 1], or one of more decimals for whose sizes no scale is exact.
    """

    def __init__(self, refiner: RefinerKind = "deep_guided_filter", downsample_ratio: float = 1.0) -> None:
        super().__init__()
        ratio = _fraction(downsample_ratio)
        height, width = (f"{side} * {ratio.numerator} // {ratio.denominator}" for side in ("height", "width"))
        rgb, multiple = ("batch", 3, "height", "width"), -(-ratio.denominator // (4 * ratio.numerator))
        self.inputs = [TensorSpec(name="src", shape=rgb, layout="NCHW", range=(0.0, 1.0), pad_multiple=multiple)]
        self.outputs = [
            TensorSpec(name="fgr", shape=rgb, layout="NCHW", range=(0.0, 1.0)),
            TensorSpec(name="pha", shape=("batch", 1, "height", "width"), layout="NCHW", range=(0.0, 1.0)),
        ]
        self.states = decoder_states(_FEATURES[3], _DECODER, *(f"({side})" for side in (height, width)))
        if ratio == 1:
            self.states = decoder_states(_FEATURES[3], _DECODER)
        self.ratio = _scale(ratio)
        self.backbone = _Backbone()
        self.decoder = RecurrentDecoder(_FEATURES, _DECODER)
        self.project = nn.Conv2d(_DECODER[3], 4, 1)
        self.refiner = Refiner(refiner) if ratio != 1 else None

    def forward(self, src: Tensor, r1: Tensor, r2: Tensor, r3: Tensor, r4: Tensor) -> tuple[Tensor, ...]:
        small = src
        if self.refiner is not None:
            small = F.interpolate(src, scale_factor=self.ratio, mode="bilinear", align_corners=False)
        features, *states = self.decoder(small, *self.backbone(small), r1, r2, r3, r4)
        matte = self.project(features)
        if self.refiner is not None:
            matte = self.refiner(src, small, matte, features)
        return (matte[:, :3] + src).clamp(0, 1), matte[:, 3:].clamp(0, 1), *states


def _with_gray(image: Tensor) -> Tensor:
    return torch.cat([image, image.mean(1, keepdim=True)], dim=1)


def _fraction(value: float) -> Fraction:
    ratio = Fraction(str(value)).limit_denominator(1000)
    if not 0 < ratio <= 1 or abs(float(ratio) - value) > 1e-9:
        raise ValueError(f"downsample_ratio: expected at most three decimals, above 0 and at most 1, got {value}")
    return ratio


def _scale(ratio: Fraction) -> float:
    """A scale for which sizes are those of the exact ratio, rounded down, in float64 (torch) and float32 (ONNX).

    Products just below an integer would lose a pixel, so the scale is the next float32 value that is large enough: it
    moves no sample by more than 0.002 pixels.
    """
    sizes = np.arange(_LARGEST + 1)
    exact = sizes * ratio.numerator // ratio.denominator
    value = float(ratio)
    narrow = np.float32(value)
    for _ in range(_STEPS):
        products = sizes.astype(np.float32) * np.float32(value), sizes.astype(np.float64) * value
        if all((product.astype(int) == exact).all() for product in products):
            return value
        value = float(narrow)
        narrow = np.nextafter(narrow, np.float32(2))
    raise ValueError(f"downsample_ratio: torch and ONNX round some sizes times {float(ratio)} differently")
