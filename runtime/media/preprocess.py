"""Preprocessing: frames to the input tensor of a model, scaled, normalised and padded as its contract says."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, UsageError
from stepcell.event_spec import EventSpec, EventWindow

__all__ = ["Preprocessor", "event_input", "gain_and_offset", "image_input", "is_image", "pad_up"]

_PIXELS = {1: "greyscale (1 channel)", 3: "colour (3 channels, RGB)"}


def is_image(spec: TensorSpec) -> bool:
    """Whether a tensor is a batch of pictures: layout NCHW with 1 or 3 channels."""
    return spec.layout == "NCHW" and len(spec.shape) == 4 and spec.shape[1] in _PIXELS


def image_input(contract: StepContract, rows: int = 1) -> TensorSpec:
    """The only data input of a model that takes pictures or events.

    Args:
        contract: contract of the model.
        rows: rows of the batch.

    Raises:
        InputError: the model has several inputs, takes neither pictures nor events, or has a fixed batch of
            another size.
    """
    hint = "step it from Python with StepLoop (docs/run.md)"
    names = ", ".join(f"{spec.name} {spec.shape}" for spec in contract.inputs)
    if len(contract.inputs) != 1 or not (is_image(contract.inputs[0]) or contract.inputs[0].events):
        raise InputError(
            f"this model takes {names or 'no input'}; a stream of frames needs exactly one input, "
            "of layout NCHW with 1 or 3 channels, or one of events",
            hint=hint,
        )
    spec = contract.inputs[0]
    if isinstance(spec.shape[0], int) and spec.shape[0] != rows:
        raise InputError(
            f"{spec.name}: the batch is fixed at {spec.shape[0]}, got {rows} stream{'s' * (rows > 1)}",
            hint=f"run as many, export the model with --dynamic batch, or {hint}",
        )
    return spec


def event_input(spec: TensorSpec, window: str | None = None) -> EventSpec | None:
    """Encoding of the events of an input; None: it takes pictures.

    Args:
        spec: the input of the model.
        window: replaces the window of the contract, in the form of `--event-window`, such as `30ms`.

    Raises:
        UsageError: a window of another form, or one for a model that takes pictures.
    """
    events = spec.events
    if isinstance(events, msgspec.UnsetType):
        if window is not None:
            raise UsageError(f"--event-window: {spec.name} takes pictures, not events")
        return None
    if window is None:
        return events
    return msgspec.structs.replace(events, window=EventWindow.parse(window, subject="--event-window"))


class Preprocessor:
    """Converts frames of one size to the input tensor of a model.

    Args:
        spec: the input of the model, of pictures or events.
        frame: the first frame: pixels (H, W, C) uint8, RGB or grey, which are scaled and normalised; or a float
            tensor (C, H, W), of pictures that are scaled already or of events.

    Attributes:
        shape: shape of every frame.
        size: (height, width) of a frame.
        padded: (height, width) of the input tensor.

    Raises:
        InputError: pictures for an event model, another number of channels, or a size that the model was not
            exported for.
    """

    def __init__(self, spec: TensorSpec, frame: NDArray[Any]) -> None:
        self.spec = spec
        self.shape = frame.shape
        pixels = frame.dtype == np.uint8
        height, width, channels = frame.shape if pixels else (*frame.shape[1:], frame.shape[0])
        if not spec.events:
            _check_channels(spec, channels)
        elif pixels or channels != spec.shape[1]:
            got = "pixels" if pixels else f"{channels} channels"
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
        self._table = _pixel_table(spec, channels) if pixels else None

    def __call__(self, frame: NDArray[Any]) -> NDArray[Any]:
        """The input tensor (1, C, H, W) in the dtype of the model, padded at the bottom and right.

        Pictures are padded by repeating the edge, events with zeros. The returned array is reused: the next call
        overwrites it.

        Raises:
            InputError: the frame differs in shape from the first one.
        """
        if frame.shape != self.shape:
            raise InputError(f"the first frame has shape {self.shape}, this one {frame.shape}")
        height, width = self.size
        inner = self._tensor[0, :, :height, :width]
        if self._table is None:
            inner[...] = frame
        else:
            for channel, table in enumerate(self._table):
                inner[channel] = np.take(table, frame[..., channel], mode="clip")  # "clip" skips the range check
        if self.spec.events:
            return self._tensor
        if height < self.padded[0]:
            self._tensor[0, :, height:, :width] = inner[:, -1:, :]
        if width < self.padded[1]:
            self._tensor[0, :, :, width:] = self._tensor[0, :, :, width - 1 : width]
        return self._tensor


def pad_up(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def gain_and_offset(spec: TensorSpec, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and offset (C, 1, 1) of tensor = pixel * gain + offset; without a range, pixels stay 0 to 255."""
    low, high = spec.range or (0.0, 255.0)
    mean = np.broadcast_to(spec.mean or 0.0, channels).reshape(-1, 1, 1)
    std = np.broadcast_to(spec.std or 1.0, channels).reshape(-1, 1, 1)
    return (high - low) / 255 / std, (low - mean) / std


def _check_channels(spec: TensorSpec, channels: int) -> None:
    if channels != spec.shape[1]:
        got = _PIXELS.get(channels, f"{channels} channels")
        wanted = _PIXELS[int(spec.shape[1])]
        pixel_format = "gray" if spec.shape[1] == 1 else "yuv420p"
        raise InputError(
            f"{spec.name}: the model takes {wanted}, the frames are {got}",
            hint=f"convert them first, such as: ffmpeg -i INPUT -pix_fmt {pixel_format} OUTPUT",
        )


def _pixel_table(spec: TensorSpec, channels: int) -> NDArray[Any]:
    """(C, 256): the tensor value of each pixel value, computed in float64 and rounded once."""
    gain, offset = gain_and_offset(spec, channels)
    table: NDArray[Any] = np.arange(256) * gain[:, :, 0] + offset[:, :, 0]
    return (np.rint(table) if np.dtype(spec.dtype).kind in "iu" else table).astype(spec.dtype)
