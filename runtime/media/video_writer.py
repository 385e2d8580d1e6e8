"""Video writer: encodes video files with PyAV (FFmpeg)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import OutputError
from stepcell.optional_imports import require
from stepcell.runtime.media.sink import output_errors
from stepcell.runtime.media.temporary_file import TemporaryFile
from stepcell.runtime.media.video_reader import BT709
from stepcell.runtime.media.video_repair import repair_video

__all__ = ["VideoSink", "encoder_for"]

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


class VideoSink:
    """A video file: H.264 if FFmpeg has the encoder, else MPEG-4; yuv420p at a constant frame rate.

    yuv420p stores one colour per 2x2 pixels: a frame of odd width or height is extended by repeating its last
    column or row.

    Args:
        path: .mp4, .mkv or .mov.
        fps: frames per second.

    Raises:
        OutputError: the file cannot be created.
        MissingDependencyError: PyAV is not installed.
    """

    takes_pixels = True

    def __init__(self, path: Path, fps: Fraction) -> None:
        av = require("av", extra="video", purpose="writing video")
        self._av = av
        self.name = str(path)
        self._fps = fps.limit_denominator(65535)  # the largest that MPEG-4 can store
        self._temporary = TemporaryFile(path)
        self.replaces = self._temporary.replaces
        fragmented = _FRAGMENTED if av.library_versions["libavformat"] >= _FRAGMENTED_SINCE else {}
        options = _MATROSKA if path.suffix == ".mkv" else fragmented
        self._container = av.open(str(self._temporary.path), "w", options=options)
        self._stream: Any = None
        self._packets = 0  # that were given to the container

    def write(self, frame: NDArray[Any]) -> None:
        height, width, channels = frame.shape
        with output_errors(self.name, self._av.FFmpegError):
            if self._stream is None:
                self._add_stream(width + width % 2, height + height % 2)
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            grey = channels == 1
            picture = self._av.VideoFrame.from_ndarray(even[..., 0] if grey else even, "gray" if grey else "rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
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
            self._container.close()
        self._keep()

    def _keep(self) -> None:
        try:
            self._temporary.keep()
        finally:
            if self._temporary.kept:
                self.name = str(self._temporary.path)

    def salvage(self) -> int:
        with contextlib.suppress(self._av.FFmpegError, OSError):
            self._container.close()
        with contextlib.suppress(self._av.FFmpegError, OSError, OutputError):
            if count := repair_video(self._temporary.path):
                with contextlib.suppress(OutputError):  # if the file is elsewhere, its name says so
                    self._keep()
                return count
        self._temporary.delete()
        return 0

    def abandon(self) -> None:
        with contextlib.suppress(self._av.FFmpegError, OSError):
            self._container.close()
        self._temporary.delete()

    def _add_stream(self, width: int, height: int) -> None:
        name, options = encoder_for(self._av.codecs_available)
        stream = self._container.add_stream(name, rate=self._fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
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
