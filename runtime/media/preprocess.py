"""Pictures and event tensors to inputs, outputs to pictures: scale, pad, crop, as the contract says."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, StepcellError, UsageError
from stepcell.event_spec import EventSpec, EventWindow

__all__ = ["FrameAdapter", "event_input", "image_input", "is_image", "pad_up", "to_pixels"]

PIXELS = {1: "greyscale (1 channel)", 3: "colour (3 channels, RGB)"}


def is_image(spec: TensorSpec) -> bool:
    """Whether a tensor is one picture: layout NCHW with 1 or 3 channels."""
    return spec.layout == "NCHW" and len(spec.shape) == 4 and spec.shape[1] in PIXELS


def image_input(contract: StepContract, streams: int = 1) -> TensorSpec:
    """The one data input, where it is a picture or an event tensor.

    Raises:
        InputError: there are several inputs, or the one is neither, or its batch is fixed at
            another number of streams.
    """
    hint = "step it from Python with stepcell.runtime.StepLoop (docs/run.md)"
    names = ", ".join(f"{spec.name} {spec.shape}" for spec in contract.inputs)
    if len(contract.inputs) != 1 or not (is_image(contract.inputs[0]) or contract.inputs[0].events):
        raise InputError(
            f"this model takes {names or 'no input'}; a stream of frames needs exactly one input, "
            "of layout NCHW with 1 or 3 channels, or one of events",
            hint=hint,
        )
    spec = contract.inputs[0]
    if isinstance(spec.shape[0], int) and spec.shape[0] != streams:
        raise InputError(
            f"{spec.name}: the batch is fixed at {spec.shape[0]}, got {streams} stream{'s' * (streams > 1)}",
            hint=f"run as many, export the model with --dynamic batch, or {hint}",
        )
    return spec


def event_input(spec: TensorSpec, window: str | None = None) -> EventSpec | None:
    """How the input is made of events, with another window where one is asked for; None: it is a picture.

    Args:
        window: as `--event-window` takes it, such as `30ms`.

    Raises:
        UsageError: another form of window, or one for a model of pictures.
    """
    events = spec.events
    if isinstance(events, msgspec.UnsetType):
        if window is not None:
            raise UsageError(f"--event-window: {spec.name} takes pictures, not events")
        return None
    if window is None:
        return events
    return msgspec.structs.replace(events, window=EventWindow.parse(window, subject="--event-window"))


class FrameAdapter:
    """Frames of one size into the input tensor of a model, and its outputs back to that size.

    Args:
        spec: the model's picture input.
        frame: the first frame: pixels (H, W, C) uint8 RGB or grey, or a tensor (C, H, W) of floats,
            taken as already scaled and normalised; or an event tensor (C, H, W).

    Raises:
        InputError: pictures for a model of events, another number of channels, or a size the model
            was not exported for.
    """

    def __init__(self, spec: TensorSpec, frame: NDArray[Any]) -> None:
        self.spec = spec
        self.shape = frame.shape
        self._pixels = frame.dtype == np.uint8
        height, width, channels = frame.shape if self._pixels else (*frame.shape[1:], frame.shape[0])
        if not spec.events:
            _check_channels(spec, channels)
        elif self._pixels or channels != spec.shape[1]:
            got = "pixels" if self._pixels else f"{channels} channels"
            raise InputError(f"{spec.name}: the model takes events, {spec.events}: {spec.shape[1]} channels; got {got}")
        self.size: tuple[int, int] = (height, width)
        self.padded = (pad_up(height, spec.pad_multiple), pad_up(width, spec.pad_multiple))
        for fixed, size in zip(spec.shape[2:], self.padded, strict=True):
            if isinstance(fixed, int) and fixed != size:
                raise InputError(
                    f"{spec.name}: the model was exported for {spec.shape[3]}x{spec.shape[2]} frames, "
                    f"got {width}x{height}",
                    hint="export it with --dynamic height,width, or resize the clip",
                )
        self._tensor = np.zeros((1, channels, *self.padded), spec.dtype)
        self._table = _pixel_table(spec, channels) if self._pixels else None

    def to_input(self, frame: NDArray[Any]) -> NDArray[Any]:
        """(1, C, H, W) in the model's dtype, padded at the bottom and right.

        A picture is continued with its edge, events with zeros: beside the sensor there are none.
        The same array every time: it is read by the step and overwritten by the next frame.

        Raises:
            InputError: the frame has another shape than the first one.
        """
        if frame.shape != self.shape:
            raise InputError(f"the first frame has shape {self.shape}, this one {frame.shape}")
        height, width = self.size
        inner = self._tensor[0, :, :height, :width]
        if self._table is None:
            inner[...] = frame
        else:
            for channel, table in enumerate(self._table):
                inner[channel] = np.take(table, frame[..., channel], mode="clip")  # "clip" skips a range check
        if self.spec.events:
            return self._tensor
        if height < self.padded[0]:
            self._tensor[0, :, height:, :width] = inner[:, -1:, :]
        if width < self.padded[1]:
            self._tensor[0, :, :, width:] = self._tensor[0, :, :, width - 1 : width]
        return self._tensor

    def crop(self, output: NDArray[Any]) -> NDArray[Any]:
        """(1, C, H', W') -> (C, H, W): without the padding, also where the model changes the size."""
        height, width = (
            -(-out * size // padded) for out, size, padded in zip(output.shape[2:], self.size, self.padded, strict=True)
        )
        return output[0, :, :height, :width]


def pad_up(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def to_pixels(spec: TensorSpec, tensor: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture output (C, H, W) as pixels (H, W, C): unscaled, clipped to 0..255, rounded.

    Raises:
        StepcellError: it holds NaN or Inf.
    """
    channels, height, width = tensor.shape
    if not np.isfinite(tensor).all():
        raise StepcellError(
            f"{spec.name}: the model returned NaN or Inf",
            hint="its state may be spoilt: --reset-every N clears it; float16 models overflow beyond 65504",
        )
    gain, offset = _scale(spec, channels)
    values = np.subtract(tensor, offset, dtype=np.float32)
    values *= (1 / gain).astype(np.float32)
    np.clip(values, 0, 255, out=values)
    np.rint(values, out=values)
    pixels = np.empty((height, width, channels), np.uint8)
    np.copyto(pixels.transpose(2, 0, 1), values, casting="unsafe")
    return pixels


def _check_channels(spec: TensorSpec, channels: int) -> None:
    if channels != spec.shape[1]:
        got = PIXELS.get(channels, f"{channels} channels")
        wanted = PIXELS[int(spec.shape[1])]
        pixel_format = "gray" if spec.shape[1] == 1 else "yuv420p"
        raise InputError(
            f"{spec.name}: the model takes {wanted}, the frames are {got}",
            hint=f"convert them first, such as: ffmpeg -i INPUT -pix_fmt {pixel_format} OUTPUT",
        )


def _scale(spec: TensorSpec, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and offset (C, 1, 1) of tensor = pixel * gain + offset; no range: 0 to 255 as it is."""
    low, high = spec.range or (0.0, 255.0)
    mean = np.broadcast_to(spec.mean or 0.0, channels).reshape(-1, 1, 1)
    std = np.broadcast_to(spec.std or 1.0, channels).reshape(-1, 1, 1)
    return (high - low) / 255 / std, (low - mean) / std


def _pixel_table(spec: TensorSpec, channels: int) -> NDArray[Any]:
    """(C, 256): the tensor value of each pixel value, rounded once, from float64."""
    low, high = spec.range or (0.0, 255.0)
    _, offset = _scale(spec, channels)
    std = np.broadcast_to(spec.std or 1.0, channels).reshape(-1, 1)
    table: NDArray[Any] = np.arange(256) / 255 * (high - low) / std + offset[:, :, 0]
    return (np.rint(table) if np.dtype(spec.dtype).kind in "iu" else table).astype(spec.dtype)
