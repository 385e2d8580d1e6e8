"""Raw frames (rgb24, gray8 or NV12) on a byte stream, such as stdin and stdout, as source and sink."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError, UsageError
from stepcell.runtime.media.sink import output_errors
from stepcell.runtime.media.source import Source

__all__ = ["RawSink", "RawSource"]


class RawSource(Source):
    """Frames in row-major order without padding: rgb24, gray8 or NV12.

    Args:
        stream: such as `sys.stdin.buffer`; `close` leaves it open.
        size: (width, height) in pixels.
        channels: 3 (rgb24), 1 (gray8) or 4.
        nv12: the frames are NV12, of whatever matrix and range the sender has; `channels` is not used.
    """

    live = True
    pixels = True

    def __init__(self, stream: BinaryIO, size: tuple[int, int], channels: int, *, nv12: bool = False) -> None:
        self.name = "stdin"
        self._stream = stream
        width, height = size
        self._shape: tuple[int, ...] = (height * 3 // 2, width) if nv12 else (height, width, channels)
        self._sent = f"{width}x{height} and " + ("NV12" if nv12 else f"{channels} bytes a pixel")
        if nv12 and (width % 2 or height % 2):
            raise UsageError(f"--size {width}x{height}: NV12 has an even width and height")

    def __iter__(self) -> Iterator[NDArray[Any]]:
        size = int(np.prod(self._shape))
        number = 0
        while data := self._read(size):
            if len(data) < size:
                raise InputError(
                    f"stdin: ended inside frame {number}: {len(data)} of {size} bytes",
                    hint=f"the sender must use {self._sent}",
                )
            self.seconds = time.monotonic()  # time of arrival
            yield np.frombuffer(data, np.uint8).reshape(self._shape)
            number += 1

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            raise InputError(f"stdin: cannot be read ({error.strerror})") from error


class RawSink:
    """Pixels to a byte stream: rgb24, or gray8 for a model of one channel."""

    takes_pixels = True
    replaces = False

    def __init__(self, stream: BinaryIO) -> None:
        self.name = "stdout"
        self._stream = stream
        self._shape: tuple[int, ...] | None = None

    def write(self, frame: NDArray[Any]) -> None:
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            raise OutputError(
                f"stdout: a frame has shape {frame.shape}, the first one {self._shape}",
                hint="--resize WIDTHxHEIGHT brings all frames to one size",
            )
        with output_errors(self.name):
            self._stream.write(np.ascontiguousarray(frame).data)

    def close(self) -> None:
        with output_errors(self.name):
            self._stream.flush()

    def salvage(self) -> int:
        self.abandon()
        return 0  # how many frames the reader received is not known

    def abandon(self) -> None:
        # Redirected, because Python would report a broken pipe again when it flushes the stream at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
