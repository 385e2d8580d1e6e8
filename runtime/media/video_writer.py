"""Pixels through PyAV (FFmpeg): video files and folders of pictures."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import OutputError
from stepcell.files import temporary_path
from stepcell.missing import require
from stepcell.runtime.media.recover import keep_whole
from stepcell.runtime.media.sinks import TemporaryFile, writing
from stepcell.runtime.media.video_reader import BT709

__all__ = ["FolderSink", "VideoSink", "encoder_for"]

# Near to lossless for the eye, and fast enough to keep up with a stream on a small CPU.
_H264 = ("libx264", {"crf": "18", "preset": "veryfast"})
_MPEG4 = ("mpeg4", {"qmin": "2", "qmax": "4"})
# A file is made of pieces of a second, so that it can be played up to where it breaks off. MP4 and QuickTime have their
# index in each piece then, and get the usual one for all of it at the end. FFmpeg can do that from 7.1 on, and from 8.1
# on together with delay_moov, without which the first frame is not at 0.0 s: before, a part of the file is lost.
_MATROSKA = {"cluster_time_limit": "1000", "flush_packets": "1"}  # ms
_PIECES = {"movflags": "+hybrid_fragmented+delay_moov", "frag_duration": "1000000", "flush_packets": "1"}  # us
_PIECES_FROM = (62, 12)  # libavformat


class VideoSink:
    """A video file: H.264 where FFmpeg has the encoder, else MPEG-4; yuv420p, constant frame rate.

    yuv420p has whole 2x2 blocks only: a frame of odd width or height is extended by repeating its
    last column or row.

    Raises:
        OutputError: the file cannot be written.
        MissingDependencyError: PyAV is not installed.
    """

    takes_pixels = True

    def __init__(self, path: Path, fps: Fraction) -> None:
        av = require("av", extra="video", purpose="writing video")
        self._av = av
        self.name = str(path)
        self._fps = fps.limit_denominator(65535)  # what MPEG-4 can hold
        self._temporary = TemporaryFile(path)
        self.replaces = self._temporary.replaces
        pieces = _PIECES if av.library_versions["libavformat"] >= _PIECES_FROM else {}
        options = _MATROSKA if path.suffix == ".mkv" else pieces
        self._container = av.open(str(self._temporary.path), "w", options=options)
        self._stream: Any = None

    def write(self, frame: NDArray[Any]) -> None:
        height, width, channels = frame.shape
        with writing(self.name, self._av.FFmpegError):
            if self._stream is None:
                self._add_stream(width + width % 2, height + height % 2)
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            grey = channels == 1
            picture = self._av.VideoFrame.from_ndarray(even[..., 0] if grey else even, "gray" if grey else "rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        with writing(self.name, self._av.FFmpegError):
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
        self._temporary.keep()

    def salvage(self) -> int:
        with contextlib.suppress(self._av.FFmpegError, OSError):
            self._container.close()
        with contextlib.suppress(self._av.FFmpegError, OSError, OutputError):
            if count := keep_whole(self._temporary.path):
                self._temporary.keep()
                return count
        self._temporary.drop()
        return 0

    def abandon(self) -> None:
        with contextlib.suppress(self._av.FFmpegError, OSError):
            self._container.close()
        self._temporary.drop()

    def _add_stream(self, width: int, height: int) -> None:
        name, options = encoder_for(self._av.codecs_available)
        stream = self._container.add_stream(name, rate=self._fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        self._stream = stream


class FolderSink:
    """A folder of 000000.png, 000001.png, ...; made under a temporary name, renamed on `close()`.

    Raises:
        OutputError: it exists and holds something, or cannot be made.
        MissingDependencyError: PyAV is not installed.
    """

    takes_pixels = True
    replaces = False

    def __init__(self, folder: Path) -> None:
        self._av = require("av", extra="video", purpose="writing pictures")
        self.name = str(folder)
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                what = "holds files" if folder.is_dir() else "is a file"
                raise OutputError(f"{folder}: {what} already", hint="name a new or an empty folder")
            self._folder = folder.resolve()  # where a link leads to, since a folder cannot replace a link
            if self._folder.is_mount() or self._folder == Path.cwd():
                what = "a mount point" if self._folder.is_mount() else "the working folder"
                raise OutputError(f"{folder}: is {what}, which cannot be replaced", hint="name a new folder in it")
            self._temporary = temporary_path(self._folder)
            self._temporary.mkdir()
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{folder}: cannot be written ({reason})") from error
        self._codec: Any = None
        self._count = 0

    def write(self, frame: NDArray[Any]) -> None:
        grey = frame.shape[2] == 1
        kind = "gray" if grey else "rgb24"
        with writing(self.name, self._av.FFmpegError):
            if self._codec is None:
                self._codec = self._av.CodecContext.create("png", "w")
                self._codec.height, self._codec.width = frame.shape[:2]
                self._codec.pix_fmt, self._codec.time_base = kind, Fraction(1, 25)
                self._codec.thread_count = 1  # more would hold frames back
            pixels = np.ascontiguousarray(frame[..., 0] if grey else frame)
            (packet,) = self._codec.encode(self._av.VideoFrame.from_ndarray(pixels, kind))
            self._picture().write_bytes(bytes(packet))
        self._count += 1

    def _picture(self) -> Path:
        """The file of the next frame."""
        return self._temporary / f"{self._count:06d}.png"

    def close(self) -> None:
        try:
            self._temporary.replace(self._folder)  # an empty folder gives way, a full one does not
        except OSError as error:
            self.abandon()
            raise OutputError(f"{self.name}: cannot be written ({error.strerror})") from error

    def salvage(self) -> int:
        if self._count:
            with contextlib.suppress(OSError, OutputError):
                self._picture().unlink(missing_ok=True)  # a part of it
                self.close()
                return self._count
        self.abandon()
        return 0

    def abandon(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


def encoder_for(available: Collection[str]) -> tuple[str, dict[str, str]]:
    """Name and options of the best encoder for .mp4 among those FFmpeg has."""
    return _H264 if _H264[0] in available else _MPEG4
