"""Quantization: what the contract of an int8 model records of how it was made (`stepcell quantize`)."""

from __future__ import annotations

import msgspec

__all__ = ["CalibrationClip", "Quantization"]


class CalibrationClip(msgspec.Struct, frozen=True, kw_only=True):
    """A clip that the ranges were measured on.

    Attributes:
        name: its file name; "frames" for arrays.
        sha256: of the file; None for a folder, and for arrays.
        frames: number of frames taken, from the first one on.
    """

    name: str
    sha256: str | None
    frames: int


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How the convolutions of a model became int8. Everything else computes in float32, states above all.

    Attributes:
        layers: convolutions with int8 weights (symmetric, a scale for each output channel) and int8 inputs and outputs
            (symmetric, a scale for the tensor).
        kept: convolutions that stay in float32.
        quantile: of the absolute values of a channel in a frame that the range covers; 1: the largest value.
        equalization: exponent of the scales that bring the ranges of channels nearer to each other; 0: none.
        clips: what was calibrated on.
        loss: by output, rms of the difference to the float32 model relative to the standard deviation of its output,
            over the last quarter of every clip, which was not calibrated on; states are fed back from the first frame.
        psnr: the same difference in dB against the range of the output, where that is known.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    quantile: float
    equalization: float
    clips: tuple[CalibrationClip, ...]
    loss: dict[str, float]
    psnr: dict[str, float] = {}
