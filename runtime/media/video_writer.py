"""Video writer: encodes video files with PyAV (FFmpeg)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import OutputError, UsageError
from stepcell.optional_imports import require
from stepcell.overwrite import MARK
from stepcell.runtime.media.audio_copy import AudioCopy
from stepcell.runtime.media.colour import BT709, Colour
from stepcell.runtime.media.resize import fit_inside
from stepcell.runtime.media.sink import output_errors
from stepcell.runtime.media.source import Source
from stepcell.runtime.media.temporary_file import TemporaryFile
from stepcell.runtime.media.video_repair import repair_video

__all__ = ["VideoSink", "encoder_for"]

logger = logging.getLogger(__name__)

# Visually close to lossless, and fast enough for a live stream on a small CPU.
_H264 = ("libx264", {"crf": "18", "preset": "veryfast"})
# The AVX-512 code of libx264 reads uninitialised memory (findings/x264-avx512-uninitialised.sh): sizes of the same clip
# differ from run to run. Its AVX2 code is as fast within the noise of a measurement.
_NO_AVX512 = {"x264-params": "asm=AVX2"}
_CPU_INFO = Path("/proc/cpuinfo")
_MPEG4 = ("mpeg4", {"qmin": "2", "qmax": "4"})
# Files are written in fragments of one second, so that an incomplete file plays up to where it ends. A finished
# hybrid-fragmented MP4 or QuickTime file also has the usual index. FFmpeg supports that from 7.1 on, but only from 8.1
# on together with delay_moov, which puts the first frame at 0.0 s. Before 8.1 an incomplete file is lost.
_MATROSKA = {"cluster_time_limit": "1000", "flush_packets": "1"}  # milliseconds
_FRAGMENTED = {"movflags": "+hybrid_fragmented+delay_moov", "frag_duration": "1000000", "flush_packets": "1"}  # us
_REORDERED = 17  # most frames that H.264 decodes before it shows one, and one for rounding
_FRAGMENTED_SINCE = (62, 12)  # version of libavformat in FFmpeg 8.1
# With B-frames, FFmpeg ends an .mp4 whose timing varies too early (findings/mp4-varying-timing-b-frames.sh).
_NO_B_FRAMES = {"bf": "0"}
# Clocks of varying timing, in ticks per second: Matroska stores milliseconds, MPEG-4 has 16 bits.
_MATROSKA_TICKS, _H264_TICKS, _MPEG4_TICKS = 1000, 90000, 60000


class VideoSink:
    """A video file: H.264 if FFmpeg has the encoder, else MPEG-4; yuv420p.

    yuv420p stores one colour per 2x2 pixels: a frame of odd width or height is extended by repeating its last
    column or row. A frame that differs in size from the first one is scaled to fit inside it, with black bars.

    Args:
        path: .mp4, .mkv or .mov.
        fps: frames per second.
        like: source whose pixel aspect and colour the video has; read when the first frame is written.
        varying: frames may have any timestamps; otherwise those of `write_at` are multiples of 1 / `fps`.
        audio: file whose sound is copied; the timestamps of `write_at` are on its clock then.

    Raises:
        OutputError: the file cannot be created.
        UsageError: the sound cannot be copied into a file of this kind.
        MissingDependencyError: PyAV is not installed.
    """

    takes_pixels = True

    def __init__(
        self,
        path: Path,
        fps: Fraction,
        *,
        like: Source | None = None,
        varying: bool = False,
        audio: Path | None = None,
    ) -> None:
        av = require("av", extra="video", purpose="writing video")
        self._av = av
        self.name = str(path)
        self._fps = fps.limit_denominator(65535)  # the largest that MPEG-4 can store
        self._like, self._varying = like, varying
        self._audio = None if audio is None else AudioCopy(audio)
        self._temporary = TemporaryFile(path)
        self.replaces = self._temporary.replaces
        self._matroska = path.suffix.lower() == ".mkv"
        fragmented = _FRAGMENTED if av.library_versions["libavformat"] >= _FRAGMENTED_SINCE else {}
        options = _MATROSKA if self._matroska else fragmented
        self._container = av.open(str(self._temporary.path), "w", options=options)
        if self._audio is not None and not self._audio.fits(self._container.format.name):
            self.abandon()
            raise UsageError(
                f"--audio copy: {audio} has {self._audio.codec} sound, which {path.suffix} cannot hold",
                hint="write to an .mkv",
            )
        self._container.metadata["comment"] = MARK
        self._stream: Any = None
        self._packets = 0  # that were given to the container
        self._shape: tuple[int, ...] = ()
        self._colour = Colour()
        self._ticks = self._fps
        self._first, self._seconds, self._tick = 0.0, 0.0, -1

    def write(self, frame: NDArray[Any]) -> None:
        """Write a frame one frame period after the last one."""
        self.write_at(frame, self._seconds + float(1 / self._fps) if self._stream else 0.0)

    def write_at(self, frame: NDArray[Any], seconds: float) -> None:
        with output_errors(self.name, self._av.FFmpegError):
            if self._stream is None:
                self._first, self._shape = seconds, frame.shape
                self._add_stream(frame)
            if frame.shape != self._shape:
                frame = fit_inside(frame, (self._shape[1], self._shape[0]))
            height, width, channels = frame.shape
            if height % 2 or width % 2:
                frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            grey = channels == 1
            picture = self._av.VideoFrame.from_ndarray(frame[..., 0] if grey else frame, "gray" if grey else "rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=self._colour.matrix)
            self._seconds = seconds
            self._tick = max(self._tick + 1, round((seconds - self._first) * self._ticks))
            picture.pts, picture.time_base = self._tick, 1 / self._ticks
            picture.duration = max(1, round(self._ticks / self._fps))
            if self._audio is not None:
                self._audio.copy(until=seconds)
            packets = self._stream.encode(picture)
            self._container.mux(packets)
            self._packets += len(packets)

    @property
    def whole(self) -> int:
        """Frames in whole fragments: without those of the last second, and those that wait to be put in order."""
        return max(0, self._packets - math.ceil(self._fps) - _REORDERED)

    def close(self) -> None:
        with output_errors(self.name, self._av.FFmpegError):
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            if self._audio is not None and self._stream is not None:
                self._audio.copy(until=self._seconds + float(1 / self._fps))
            self._close_files()
        self._keep()

    def _close_files(self) -> None:
        if self._audio is not None:
            self._audio.close()
        self._container.close()

    def _keep(self) -> None:
        try:
            self._temporary.keep()
        finally:
            if self._temporary.kept:
                self.name = str(self._temporary.path)

    def salvage(self) -> int:
        with contextlib.suppress(self._av.FFmpegError, OSError):
            self._close_files()
        with contextlib.suppress(self._av.FFmpegError, OSError, OutputError):
            if count := repair_video(self._temporary.path):
                with contextlib.suppress(OutputError):  # if the file is elsewhere, its name says so
                    self._keep()
                return count
        self._temporary.delete()
        return 0

    def abandon(self) -> None:
        with contextlib.suppress(self._av.FFmpegError, OSError):
            self._close_files()
        self._temporary.delete()

    def _add_stream(self, frame: NDArray[Any]) -> None:
        name, options = encoder_for(self._av.codecs_available)
        if self._varying:
            h264 = name == _H264[0]
            options = {**options, **(_NO_B_FRAMES if h264 else {})}
            self._ticks = Fraction(_MATROSKA_TICKS if self._matroska else _H264_TICKS if h264 else _MPEG4_TICKS)
        stream = self._container.add_stream(name, rate=self._fps, options=options)
        height, width, channels = frame.shape
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self._ticks
        if self._like is not None:
            if self._like.colour is not None and channels == 3:
                self._colour = self._like.colour.output
                reformatter = require("av.video.reformatter", extra="video", purpose="writing video")
                if not hasattr(reformatter.Colorspace, "BT2020"):  # PyAV 17
                    self._colour = replace(self._colour, matrix=BT709)
            if self._like.pixel_aspect != 1:
                stream.sample_aspect_ratio = context.sample_aspect_ratio = self._like.pixel_aspect
        context.colorspace, context.color_primaries = self._colour.matrix, self._colour.primaries
        context.color_trc = self._colour.transfer
        if self._audio is not None:
            self._audio.begin(self._container, start=self._first)
        self._stream = stream


def encoder_for(available: Collection[str]) -> tuple[str, dict[str, str]]:
    """Name and options of the encoder to use, of those that FFmpeg has."""
    if _H264[0] not in available:
        return _MPEG4
    name, options = _H264
    return name, {**options, **(_NO_AVX512 if _has_avx512() else {})}


def _has_avx512() -> bool:
    with contextlib.suppress(OSError):
        return b" avx512bw " in _CPU_INFO.read_bytes()
    return False
