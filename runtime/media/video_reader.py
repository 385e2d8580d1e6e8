"""Frames through PyAV (FFmpeg): video files, URLs, cameras, folders of pictures."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.missing import require
from stepcell.runtime.media.sources import RATES, shown

__all__ = ["BT709", "CAMERA", "FolderSource", "VideoSource", "natural_key"]

CAMERA = re.compile(r"camera:(\d{1,3})")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
BT709 = 1  # FFmpeg's number for it, the same for matrix, primaries and transfer
# A lost URL ends the run with an error instead of hanging: seconds to open, seconds between packets.
URL_TIMEOUT = (10.0, 10.0)
# A file is cut off where this much of its declared length is missing; headers round.
CUT_OFF, CUT_OFF_SECONDS = 0.9, 0.5
BROKEN_PACKETS = 100  # in a row, from which a live stream is taken for broken: a loss on the way is shorter


class VideoSource:
    """A video file, a URL or `camera:N` (Video4Linux).

    Raises:
        InputError: it cannot be opened, or has no picture stream.
        MissingDependencyError: PyAV is not installed.
    """

    def __init__(self, name: str) -> None:
        av = require("av", extra="video", purpose="reading video")
        self.name = shown(name)
        self._error: type[Exception] = av.FFmpegError
        camera = CAMERA.fullmatch(name)
        try:
            # Titles are in any encoding, and nobody reads them here; PyAV takes them as they are from 19 on.
            options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
            if camera:
                self._container = av.open(f"/dev/video{camera[1]}", format="v4l2", **options)
            elif "://" in name:
                self._container = av.open(name, timeout=URL_TIMEOUT, **options)
            else:  # a colon in a file name is no protocol
                self._container = av.open(f"file:{name}", **options)
        except (av.FFmpegError, OSError) as error:
            what = "camera" if camera else "video"
            raise InputError(f"{self.name}: cannot be opened as {what} ({_reason(error)})") from error
        if not self._container.streams.video:
            self._container.close()
            raise InputError(f"{self.name}: has no video stream")
        self._stream = self._container.streams.video[0]
        self.live = bool(camera) or "://" in name
        # Decoding frames side by side holds back one for each thread: of a camera these come late, and
        # are lost with it.
        self._stream.thread_type = "SLICE" if self.live else "AUTO"
        self.seconds: float | None = None
        self._broken = 0  # packets since the last good one
        rate = self._stream.average_rate or self._stream.guessed_rate
        # PyAV 19 has a type of its own. With another rate FFmpeg would write files that it cannot read.
        self.fps: Fraction | None = Fraction(rate) if rate and RATES[0] <= rate <= RATES[1] else None
        self.length: int | None = None if self.live else self._stream.frames or None
        self._seconds = None if self.live else self._declared_seconds()

    def _declared_seconds(self) -> float | None:
        """How long the file says its pictures go on; None where it does not say."""
        if self._stream.duration is not None:
            return float(self._stream.duration * Fraction(self._stream.time_base))
        alone = len(self._container.streams) == 1  # else the length may be that of the sound
        return self._container.duration / 1e6 if alone and self._container.duration else None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        number, shape, first, last = 0, None, 0.0, 0.0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:  # the last frame may be shown for long
                    last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                for frame in self._decode(packet, number):
                    pixels = _pixels(frame)
                    if pixels.shape != (shape := shape or pixels.shape):
                        raise InputError(f"{self.name}: frame {number} is {pixels.shape}, the first one {shape}")
                    self.seconds = time.monotonic() if frame.time is None and self.live else frame.time
                    yield pixels
                    first = first if number else frame.time or 0.0
                    last = max(last, frame.time or 0.0)
                    number += 1
        except (self._error, OSError) as error:
            raise InputError(f"{self.name}: broken at frame {number} ({_reason(error)})") from error
        if number == 0:
            raise InputError(f"{self.name}: holds no frame")
        if self._seconds is not None and last - first < CUT_OFF * self._seconds - CUT_OFF_SECONDS:
            # Some formats (Matroska) end a cut file like a whole one.
            raise InputError(
                f"{self.name}: cut off: its header says {self._seconds:.1f} s, {last - first:.1f} s are there"
            )

    def _decode(self, packet: Any, number: int) -> Sequence[Any]:
        """The frames of a packet. A live stream goes on without a broken one, unless many are in a row."""
        try:
            if packet.is_corrupt:
                raise InputError(f"{self.name}: broken or cut off at frame {number}")
            frames: Sequence[Any] = packet.decode()
        except (InputError, self._error):
            self._broken += 1
            if not self.live or self._broken > BROKEN_PACKETS:
                raise
            return ()
        self._broken = 0
        return frames

    def close(self) -> None:
        self._container.close()


class FolderSource:
    """The pictures of a folder, in natural order: frame2.png before frame10.png.

    Raises:
        InputError: there is none.
        MissingDependencyError: PyAV is not installed.
    """

    fps: Fraction | None = None
    live = False
    seconds: float | None = None

    def __init__(self, folder: Path) -> None:
        require("av", extra="video", purpose="reading pictures")
        self.name = str(folder)
        try:
            files = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()]
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
        self._files = sorted(files, key=lambda path: natural_key(path.name))
        if not files:
            raise InputError(f"{folder}: holds no picture ({', '.join(PICTURES)})")
        self.length: int | None = len(files)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        shape = None
        for path in self._files:
            pixels = _read_picture(path)
            if pixels.shape != (shape := shape or pixels.shape):
                raise InputError(f"{path}: is {pixels.shape}, the first picture {shape}")
            yield pixels

    def close(self) -> None:
        pass


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares runs of digits as numbers."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", name))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts, name  # the name itself decides between 1.png and 01.png


def _read_picture(path: Path) -> NDArray[np.uint8]:
    source = VideoSource(str(path))
    try:
        return next(iter(source))
    finally:
        source.close()


def _pixels(frame: Any) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, or (H, W, 1) where the stream is grey; turned upright as its metadata says."""
    kind = frame.format
    grey = len(kind.components) <= 2 and not kind.has_palette  # one of luma, one of alpha
    # PyAV up to 16 decodes BT.709 with the matrix of BT.601 unless both are named, and not alike.
    matrix = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"} if frame.colorspace == BT709 and not grey else {}
    array: NDArray[np.uint8] = frame.to_ndarray(format="gray" if grey else "rgb24", **matrix)
    turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise; phones film sideways
    upright = np.rot90(array, turns)
    return upright.reshape(*upright.shape[:2], 1 if grey else 3)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "ExitError":  # FFmpeg was told to give up, by `timeout`
        return f"no answer within {URL_TIMEOUT[1]:g} s"
    return getattr(error, "strerror", None) or str(error)
