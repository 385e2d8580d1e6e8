"""Video reader: decodes files, URLs and cameras with PyAV (FFmpeg)."""

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
from stepcell.optional_imports import require
from stepcell.runtime.media.ffmpeg_input import input_options, lists_files
from stepcell.runtime.media.source import FRAME_RATES, Source, display_name

__all__ = ["BT709", "CAMERA", "VideoSource"]

CAMERA = re.compile(r"camera:(\d{1,3})")
BT709 = 1  # FFmpeg's number of it, the same for matrix, primaries and transfer function
# Timeouts of a URL in seconds, for opening and between packets: without them a lost connection would hang.
URL_TIMEOUT = (10.0, 10.0)
# A file counts as cut off if it is shorter than this share of its declared duration, less a second's rounding.
CUT_OFF, CUT_OFF_SECONDS = 0.9, 0.5
BROKEN_PACKETS = 100  # consecutive damaged packets that end a live stream; transmission errors are shorter


class VideoSource(Source):
    """A video file, a URL or `camera:N` (Video4Linux).

    Raises:
        InputError: it cannot be opened, has no video stream, or is a playlist of other files.
        UsageError: a URL of a protocol that is not for streams.
        MissingDependencyError: PyAV is not installed.
    """

    def __init__(self, name: str) -> None:
        av = require("av", extra="video", purpose="reading video")
        self.name = display_name(name)
        self._error: type[Exception] = av.FFmpegError
        camera = CAMERA.fullmatch(name)
        try:
            # Metadata such as titles may be in any encoding; PyAV before 19 fails on it unless told otherwise.
            options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
            if camera:
                self._container = av.open(f"/dev/video{camera[1]}", format="v4l2", **options)
            else:
                container_options = input_options(name, av.formats_available)
                if "://" in name:
                    self._container = av.open(name, timeout=URL_TIMEOUT, options=container_options, **options)
                else:  # "file:" keeps a colon in a file name from being read as a protocol
                    self._container = av.open(f"file:{name}", options=container_options, **options)
        except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: a null byte
            what = "camera" if camera else "video"
            if not camera and lists_files(Path(name)):
                raise InputError(
                    f"{self.name}: names other files, which are not opened",
                    hint=f"join them into one video first: ffmpeg -i {self.name} -c copy joined.mkv",
                ) from error
            raise InputError(f"{self.name}: cannot be opened as {what} ({_reason(error)})") from error
        if not self._container.streams.video:
            self._container.close()
            raise InputError(f"{self.name}: has no video stream")
        self._stream = self._container.streams.video[0]
        self.live = bool(camera) or "://" in name
        # Frame threading delays the output by one frame per thread, and loses these frames with the connection.
        self._stream.thread_type = "SLICE" if self.live else "AUTO"
        self._broken = 0  # consecutive damaged packets
        rate = self._stream.average_rate or self._stream.guessed_rate
        # Fraction(): PyAV 19 has a type of its own. Outside this range FFmpeg writes files that it cannot read.
        self.fps = Fraction(rate) if rate and FRAME_RATES[0] <= rate <= FRAME_RATES[1] else None
        self.length = None if self.live else self._stream.frames or None
        self._duration = None if self.live else self._declared_duration()

    def _declared_duration(self) -> float | None:
        """Duration of the video in seconds according to the header of the file; None: not stated."""
        if self._stream.duration is not None:
            return float(self._stream.duration * Fraction(self._stream.time_base))
        alone = len(self._container.streams) == 1  # with several streams it may be the duration of the audio
        return self._container.duration / 1e6 if alone and self._container.duration else None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        number, shape, first, last = 0, None, 0.0, 0.0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:  # the packet's duration counts: the last frame may be shown for long
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
        if self._duration is not None and last - first < CUT_OFF * self._duration - CUT_OFF_SECONDS:
            # FFmpeg ends some formats (Matroska) without an error where the file was cut off.
            raise InputError(
                f"{self.name}: truncated: its header says {self._duration:.1f} s, it ends after {last - first:.1f} s"
            )

    def _decode(self, packet: Any, number: int) -> Sequence[Any]:
        """The frames of a packet; a live stream skips damaged packets until too many are consecutive."""
        try:
            if packet.is_corrupt:
                raise InputError(f"{self.name}: broken or truncated at frame {number}")
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


def _pixels(frame: Any) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, or (H, W, 1) if the stream is grey; rotated as the metadata says."""
    layout = frame.format
    grey = len(layout.components) <= 2 and not layout.has_palette  # luma alone, or luma and alpha
    # PyAV up to 16 decodes BT.709 with the matrix of BT.601 unless source and destination are named and differ.
    matrix = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"} if frame.colorspace == BT709 and not grey else {}
    array: NDArray[np.uint8] = frame.to_ndarray(format="gray" if grey else "rgb24", **matrix)
    quarter_turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise
    upright = np.rot90(array, quarter_turns)
    return upright.reshape(*upright.shape[:2], 1 if grey else 3)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "ExitError":  # FFmpeg was interrupted because of `timeout`
        return f"no answer within {URL_TIMEOUT[1]:g} s"
    return getattr(error, "strerror", None) or str(error)
