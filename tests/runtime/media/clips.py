"""Clips of every kind that tests of the video formats write with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

__all__ = ["WEIGHTS", "marked", "timestamps", "write_clip"]


# kr and kb of ITU-R BT.709, BT.601 (three numbers), SMPTE 240M and BT.2020, by the matrix of ITU-T H.273.
WEIGHTS = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)} | dict.fromkeys((2, 5, 6), (0.299, 0.114))


def marked(width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """A picture by which its eight orientations can be told apart: white at the upper left, red at the lower left."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[: height // 4, : width // 3] = 250
    pixels[-height // 4 :, : width // 5] = (250, 30, 30)
    return pixels


def write_clip(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    *,
    milliseconds: Sequence[int] | None = None,
    colour: tuple[int, int, int] | None = None,
    full_range: bool = False,
    aspect: Fraction | None = None,
    sound: str | None = None,
    start: int = 0,
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    **options: str,
) -> Path:
    """Write frames of 25 per second, or at these times, and a tone of the same length.

    Args:
        colour: numbers of matrix, primaries and transfer function, for yuv444p.
        start: number of the first frame on the clock of the file.
        sound: audio codec.
    """
    ticks = 1000 if milliseconds else 25
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25, options={"qmin": "1", "qmax": "2"} if codec == "mpeg4" else {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        context = stream.codec_context
        context.time_base = Fraction(1, ticks)
        if aspect:
            stream.sample_aspect_ratio = context.sample_aspect_ratio = aspect
        if colour:
            context.colorspace, context.color_primaries, context.color_trc = colour
        if full_range:
            context.color_range = 2
        tone = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        for number, array in enumerate(frames):
            if colour:
                frame = av.VideoFrame.from_ndarray(_coded(array, colour[0]), "yuv444p")
            else:
                frame = av.VideoFrame.from_ndarray(array, "rgb24")
                frame = frame.reformat(format=pixels, dst_color_range=2 if full_range else None)
            frame.pts = (milliseconds[number] if milliseconds else number) + start
            frame.time_base = Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone is not None:
            _add_tone(container, tone, len(frames) * 1920, start * 1920)
    return path


def _coded(pixels: NDArray[np.uint8], matrix: int) -> NDArray[np.uint8]:
    """RGB (H, W, 3) as Y, Cb and Cr (3, H, W) of limited range."""
    kr, kb = WEIGHTS.get(matrix, WEIGHTS[1])
    red, green, blue = np.moveaxis(pixels / 255, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [128 + 224 * (red_or_blue - luma) / (2 * (1 - k)) for red_or_blue, k in ((blue, kb), (red, kr))]
    return np.rint([16 + 219 * luma, *chroma]).astype(np.uint8)


def _add_tone(container: Any, stream: Any, samples: int, start: int) -> None:
    wave = (8000 * np.sin(np.arange(samples) * 2 * np.pi * 440 / 48000)).astype(np.int16)
    for first in range(0, samples, 960):
        frame = av.AudioFrame.from_ndarray(wave[None, first : first + 960], "s16", "mono")
        frame.rate, frame.pts, frame.time_base = 48000, first + start, Fraction(1, 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def timestamps(path: Path) -> list[float]:
    """Time of every picture in seconds."""
    with av.open(str(path)) as container:
        return [round(frame.time, 3) for frame in container.decode(video=0) if frame.time is not None]
