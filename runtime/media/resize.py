"""Resizing of frames, for models of a fixed size."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import TensorSpec
from stepcell.errors import InputError, UsageError
from stepcell.nv12 import nv12_of, nv12_planes
from stepcell.optional_imports import require
from stepcell.runtime.media.colour import Colour
from stepcell.runtime.media.source import Source

__all__ = ["Resize", "ResizedSource", "fit_inside", "resize"]

logger = logging.getLogger(__name__)

Size = tuple[int, int]


@dataclass(frozen=True)
class Resize:
    """The size to which all frames are brought.

    Attributes:
        size: (width, height) in pixels.
        fit: the proportions are kept, and black bars fill the rest; otherwise the picture is stretched.
        black: luma of the bars of NV12.
    """

    size: Size
    fit: bool = False
    black: int = 0

    @classmethod
    def parse(cls, text: str, spec: TensorSpec) -> Resize:
        """From `stretch`, `fit`, `640x360` or `640x360,fit`; without a size it is that of the model.

        Args:
            text: value of `--resize`.
            spec: input of the model.

        Raises:
            UsageError: another form, or no size where that of the model is not fixed.
        """
        match = re.fullmatch(r"(?:([1-9]\d{0,4})x([1-9]\d{0,4}))?,?(fit|stretch)?", text)
        if match is None or not text.strip(","):
            raise UsageError(
                f"--resize: expected WIDTHxHEIGHT, fit, stretch or WIDTHxHEIGHT,fit, got {text!r}",
                hint="such as --resize 640x360,fit; without a value the frames are stretched to the size of the model",
            )
        how = nv12_of(spec)
        black = 16 if how is not None and how.range == "limited" else 0
        if match[1]:
            if how and (int(match[1]) % 2 or int(match[2]) % 2):
                raise UsageError(f"--resize {text}: {spec.name} takes NV12, of an even width and height")
            return cls((int(match[1]), int(match[2])), match[3] == "fit", black)
        layout = spec.layout or ("NHW"[-len(spec.shape) :] if how else "NCHW")
        height, width = spec.shape[layout.index("H")], spec.shape[layout.index("W")]
        height = height // 3 * 2 if how and isinstance(height, int) else height
        if not isinstance(height, int) or not isinstance(width, int):
            raise UsageError(
                f"--resize {text}: the size of {spec.name} is not fixed in the model ({width} x {height})",
                hint=f"name a size, such as --resize 640x360{',fit' * (text == 'fit')}",
            )
        return cls((width, height), match[3] == "fit", black)


class ResizedSource(Source):
    """A source whose frames are brought to one size.

    Args:
        source: of pixels; closed with this.
        how: size and proportions.
    """

    def __init__(self, source: Source, how: Resize) -> None:
        require("av", extra="video", purpose="resizing frames")
        self._source, self._how = source, how
        self.name, self.fps, self.length, self.live = source.name, source.fps, source.length, source.live
        self.has_sound, self.pixels = source.has_sound, getattr(source, "pixels", None)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        shape = None
        for frame in self._source:
            self.seconds = self._source.seconds
            if frame.dtype != np.uint8:
                raise InputError(
                    f"{self.name}: --resize takes pixels (uint8), not tensors of {frame.dtype}",
                    hint="resize the tensors before they are saved",
                )
            if frame.shape != shape:
                shape = frame.shape
                self._say(shape[1], shape[0] // 3 * 2 if frame.ndim == 2 else shape[0])
            yield self._resized(frame)

    def _resized(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        (width, height), fit = self._how.size, self._how.fit
        if frame.ndim == 3:
            return fit_inside(frame, self._how.size) if fit else resize(frame, self._how.size)
        luma, chroma = nv12_planes(frame)
        half = (width // 2, height // 2)
        inner = _inner_size((chroma.shape[1], chroma.shape[0]), half) if fit else half
        whole = np.empty((height * 3 // 2, width), np.uint8)
        for plane, scale, place in zip((luma[..., None], chroma), (2, 1), nv12_planes(whole), strict=True):
            place[...] = self._how.black if scale == 2 else 128
            resized = resize(plane, (inner[0] * scale, inner[1] * scale))
            left, top = (half[0] - inner[0]) // 2 * scale, (half[1] - inner[1]) // 2 * scale
            part = place[top : top + resized.shape[0], left : left + resized.shape[1]]
            part[...] = resized.reshape(part.shape)
        return whole

    def _say(self, width: int, height: int) -> None:
        """Tell how frames of this size are resized, and set the aspect of the resized pixels."""
        (new_width, new_height), aspect = self._how.size, self._source.pixel_aspect
        self.colour: Colour | None = self._source.colour
        self.pixel_aspect = aspect
        if (width, height) == self._how.size:
            return
        stretched = Fraction(width * new_height, height * new_width)
        how = "in proportion"
        if self._how.fit:
            inner = _inner_size((width, height), self._how.size)
            how = f"in proportion ({inner[0]}x{inner[1]}, black bars around it)" if inner != self._how.size else how
        elif stretched != 1:
            self.pixel_aspect = (aspect * stretched).limit_denominator(1000)
            longer, factor = ("height", stretched) if stretched > 1 else ("width", 1 / stretched)
            how = f"{longer} stretched {float(factor):.3g} times; --resize fit keeps the proportions"
        logger.info(
            f"{self.name}: {width}x{height} resized to {new_width}x{new_height} (bilinear, antialiased), {how}; "
            "outputs are not scaled back"
        )

    def close(self) -> None:
        self._source.close()


def resize(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Pixels (H, W, C) in another size (width, height): bilinear, and averaging where the picture shrinks.

    The filter is that of FFmpeg's swscale. One channel at a time takes 8 ms from 1920x1080 to 640x360, RGB at once 45.
    """
    height, width, channels = pixels.shape
    if (width, height) == size:
        return pixels
    av = require("av", extra="video", purpose="resizing frames")
    resized = np.empty((size[1], size[0], channels), np.uint8)
    for channel in range(channels):
        plane = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[..., channel]), "gray")
        resized[..., channel] = plane.reformat(width=size[0], height=size[1], interpolation="BILINEAR").to_ndarray()
    return resized


def fit_inside(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Pixels (H, W, C), resized in proportion and centred in a black picture of a size (width, height)."""
    inner = _inner_size((pixels.shape[1], pixels.shape[0]), size)
    resized = resize(pixels, inner)
    if inner == size:
        return resized
    whole = np.zeros((size[1], size[0], pixels.shape[2]), np.uint8)
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    whole[top : top + inner[1], left : left + inner[0]] = resized
    return whole


def _inner_size(size: Size, outer: Size) -> Size:
    """The largest size of the same proportions inside another, at least 1x1."""
    scale = min(Fraction(outer[0], size[0]), Fraction(outer[1], size[1]))
    width, height = (max(1, min(limit, round(each * scale))) for each, limit in zip(size, outer, strict=True))
    return width, height
