"""Video reader: decodes files, URLs and cameras with PyAV (FFmpeg)."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.display import displayed
from stepcell.errors import InputError
from stepcell.nv12 import Nv12
from stepcell.optional_imports import require
from stepcell.runtime.media.colour import Colour
from stepcell.runtime.media.ffmpeg_input import input_options, lists_files
from stepcell.runtime.media.nv12_frames import Nv12Frames
from stepcell.runtime.media.orientation import UPRIGHT, frame_orientation
from stepcell.runtime.media.source import FRAME_RATES, Source, display_name
from stepcell.runtime.media.truncation import missing_bytes

__all__ = ["CAMERA", "VideoSource", "open_container"]

logger = logging.getLogger(__name__)

CAMERA = re.compile(r"camera:(\d{1,3})")
# Timeouts of a URL in seconds, for opening and between packets: without them a lost connection would hang.
URL_TIMEOUT = (10.0, 10.0)
# A file whose container does not say where it ends counts as cut off if it is shorter than this share of its declared
# duration, less a second's rounding.
CUT_OFF, CUT_OFF_SECONDS = 0.9, 0.5
BROKEN_PACKETS = 100  # consecutive damaged packets that end a live stream; transmission errors are shorter


class VideoSource(Source):
    """A video file, a URL or `camera:N` (Video4Linux).

    Args:
        name: of it.
        nv12: give frames as NV12 of this matrix and range; None: as RGB or grey.

    Raises:
        InputError: it cannot be opened, has no video stream, or is a playlist of other files.
        UsageError: a URL of a protocol that is not for streams.
        MissingDependencyError: PyAV is not installed.
    """

    pixels = True

    def __init__(self, name: str, nv12: Nv12 | None = None) -> None:
        av = require("av", extra="video", purpose="reading video")
        self.name = display_name(name)
        self._nv12 = None if nv12 is None else Nv12Frames(nv12, self.name)
        self._error: type[Exception] = av.FFmpegError
        camera = CAMERA.fullmatch(name)
        self._path = None if camera or "://" in name else Path(name)
        try:
            if camera:
                self._container = open_container(av, f"/dev/video{camera[1]}", format="v4l2")
            else:
                options = input_options(name, av.formats_available)
                if "://" in name:
                    self._container = open_container(av, name, timeout=URL_TIMEOUT, options=options)
                else:  # "file:" keeps a colon in a file name from being read as a protocol
                    self._container = open_container(av, f"file:{name}", options=options)
        except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: a null byte
            what = "camera" if camera else "video"
            if not camera and lists_files(Path(name)):
                raise InputError(
                    f"{self.name}: names other files, which are not opened",
                    hint=f"join them into one video first: ffmpeg -i {self.name} -c copy joined.mkv",
                ) from error
            raise InputError(f"{self.name}: cannot be opened as {what} ({_reason(error)})") from _shown(error)
        if not self._container.streams.video:
            self._container.close()
            raise InputError(f"{self.name}: has no video stream")
        self._stream = self._container.streams.video[0]
        self.live = bool(camera) or "://" in name
        # Frame threading delays the output by one frame per thread, and loses these frames with the connection.
        self._stream.thread_type = "SLICE" if self.live else "AUTO"
        self._rotation: int | None = None  # of the last frame, in degrees, without mirroring
        self._orientation = UPRIGHT
        self._joinable = self._container.format.name == "mpegts"
        self._broken = 0  # consecutive damaged packets
        rate = self._stream.average_rate or self._stream.guessed_rate
        # Fraction(): PyAV 19 has a type of its own. Outside this range FFmpeg writes files that it cannot read.
        self.fps = Fraction(rate) if rate and FRAME_RATES[0] <= rate <= FRAME_RATES[1] else None
        self.length = None if self.live else self._stream.frames or None
        self.has_sound = bool(self._container.streams.audio)
        self._duration = None if self.live else self._declared_duration()

    def _declared_duration(self) -> float | None:
        """Duration of the video in seconds according to the header of the file; None: not stated."""
        if self._stream.duration is not None:
            return float(self._stream.duration * Fraction(self._stream.time_base))
        alone = len(self._container.streams) == 1  # with several streams it may be the duration of the audio
        return self._container.duration / 1e6 if alone and self._container.duration else None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        number, first, last = 0, 0.0, 0.0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:  # the packet's duration counts: the last frame may be shown for long
                    last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                for frame in self._decode(packet, number):
                    pixels = self._pixels(frame)
                    self.seconds = time.monotonic() if frame.time is None and self.live else frame.time
                    yield pixels
                    first = first if number else frame.time or 0.0
                    last = max(last, frame.time or 0.0)
                    number += 1
        except (self._error, OSError) as error:
            webp = self._path is not None and self._path.suffix.lower() == ".webp"
            raise InputError(
                f"{self.name}: broken at frame {number} ({_reason(error)})",
                hint="an animated .webp needs PyAV 19 or later" if webp else None,
            ) from _shown(error)
        if number == 0:
            raise InputError(f"{self.name}: holds no frame")
        self._check_complete(first, last)

    def _check_complete(self, first: float, last: float) -> None:
        """Raise InputError if the file was cut off: FFmpeg ends Matroska, for one, without an error.

        Args:
            first: timestamp of the first frame, in seconds.
            last: when the last one ends.
        """
        if self._path is None:
            return
        missing = missing_bytes(self._path)
        if missing:
            raise InputError(
                f"{self.name}: truncated: {missing} bytes are missing at its end, the video stops at {last:.1f} s"
            )
        # The clock of a piece of a recording goes on from the piece before it. Some programs write the duration from
        # the first frame on, others from zero.
        if missing is None and self._duration is not None and last < CUT_OFF * self._duration - CUT_OFF_SECONDS:
            raise InputError(
                f"{self.name}: truncated: its header says {self._duration:.1f} s, it ends after {last - first:.1f} s"
            )

    def _decode(self, packet: Any, number: int) -> Sequence[Any]:
        """The frames of a packet; a live stream skips damaged packets until too many are consecutive.

        In a file of MPEG-TS the mark is also set where two recordings were joined, so a marked packet is decoded.
        """
        try:
            if packet.is_corrupt and (self.live or not self._joinable):
                raise InputError(f"{self.name}: broken or truncated at frame {number}")
            if packet.is_corrupt:
                logger.warning(f"{self.name}: frame {number} or one of the next: damaged, or recordings joined there")
            frames: Sequence[Any] = packet.decode()
        except (InputError, self._error):
            self._broken += 1
            if not self.live or self._broken > BROKEN_PACKETS:
                raise
            return ()
        self._broken = 0
        return frames

    def _pixels(self, frame: Any) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, (H, W, 1) if the stream is grey, or NV12; turned and mirrored as the metadata says."""
        if frame.rotation != self._rotation:
            # Not for every frame: one whose side data was looked at is not freed before the next garbage collection
            # (findings/pyav-side-data-keeps-frames.sh).
            self._rotation, self._orientation = frame.rotation, frame_orientation(frame, self._path)
        orientation = self._orientation
        if self.colour is None:
            self._describe(frame, turned=orientation.transpose)
        if self._nv12 is not None:
            return self._nv12(frame, orientation)
        layout = frame.format
        grey = len(layout.components) <= 2 and not layout.has_palette  # luma alone, or luma and alpha
        array: NDArray[np.uint8] = frame.to_ndarray(format="gray" if grey else "rgb24")
        upright = orientation(array)
        return upright.reshape(*upright.shape[:2], 1 if grey else 3)

    def _describe(self, frame: Any, *, turned: bool) -> None:
        """Set what is known from the first frame on."""
        aspect = self._stream.sample_aspect_ratio or self._stream.codec_context.sample_aspect_ratio
        if aspect:
            self.pixel_aspect = Fraction(aspect.denominator, aspect.numerator) if turned else Fraction(aspect)
        self.colour = Colour.of_frame(frame)
        if not self.colour.known:
            raise InputError(
                f"{self.name}: its colour matrix (number {self.colour.matrix} of ITU-T H.273) is not supported",
                hint="convert it first, such as: ffmpeg -i INPUT -vf libplacebo=colorspace=bt709 OUTPUT",
            )
        if self.colour.high_dynamic_range:
            logger.warning(
                f"{self.name}: high dynamic range ({self.colour}): the model gets its values as they are coded, "
                "in 8 bits and without tone mapping; a video output keeps primaries and transfer function, in 8 bits"
            )

    def close(self) -> None:
        self._container.close()


def open_container(av: ModuleType, name: str, **options: Any) -> Any:
    """`av.open` for reading, whatever the encoding of titles and other metadata: PyAV before 19 would fail on it."""
    if int(av.__version__.split(".")[0]) < 19:
        options["metadata_errors"] = "replace"
    return av.open(name, **options)


def _shown(error: Exception) -> Exception:
    """The same error without the secrets of its URL, which PyAV names: a stack shows it as the cause of ours."""
    error.args = tuple(displayed(each) if isinstance(each, str) else each for each in error.args)
    return error


def _reason(error: Exception) -> str:
    if type(error).__name__ == "ExitError":  # FFmpeg was interrupted because of `timeout`
        return f"no answer within {URL_TIMEOUT[1]:g} s"
    return getattr(error, "strerror", None) or str(error)
