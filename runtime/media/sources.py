"""Where frames come from: video, camera, folder of pictures, array, raw frames on stdin, or events.

A source is iterated once. Video, pictures and raw frames come as pixels (H, W, C) uint8, C = 3
(RGB) or 1 (grey); a float array and events come as tensors (C, H, W). A frame that cannot be read
raises InputError with its number.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, UsageError
from stepcell.event_spec import EventSpec

__all__ = ["RATES", "STDIN", "ArraySource", "RawSource", "Source", "is_remote", "open_source", "parse_size", "shown"]

STDIN = "-"
RATES = (Fraction(1, 1000), Fraction(1000))  # frames per second: what is less or more is no rate of a video


class Source(Protocol):
    """A stream of frames.

    Attributes:
        name: as the user wrote it; "stdin" for `-`.
        fps: frames per second, where the source knows.
        length: number of frames, where the source knows.
        live: it goes on from now when it is opened again, and not from its first frame.
        seconds: when the frame that came last was taken, on the source's own clock; None where
            frames have no time.
    """

    name: str
    fps: Fraction | None
    length: int | None
    live: bool
    seconds: float | None

    def __iter__(self) -> Iterator[NDArray[Any]]: ...

    def close(self) -> None: ...


def open_source(
    text: str, *, channels: int = 3, size: tuple[int, int] | None = None, events: EventSpec | None = None
) -> Source:
    """Open what the user named.

    Args:
        text: a video file or URL, a folder of .png/.jpg, a .npy, `camera:N`, or `-` for stdin; for a
            model of events a .dat, .raw or .npz file of them.
        channels: of the raw frames on stdin: 3 (rgb24) or 1 (gray8).
        size: (width, height) of the raw frames on stdin, or of the sensor where a file of events
            does not say.
        events: how the model's input is made of events, where it is.

    Raises:
        UsageError: `-` without a size, or a size that nothing takes.
        InputError: it does not exist, cannot be read as frames, or is not what the model takes.
    """
    from stepcell.runtime.media.events.source import EVENT_FILES, EventSource
    from stepcell.runtime.media.video_reader import FolderSource, VideoSource

    if (events is not None) != (Path(text).suffix in EVENT_FILES):
        wanted = "events" if events is not None else "pictures"
        files = ", ".join(EVENT_FILES) if events is not None else "a video, pictures or .npy"
        raise InputError(f"{text}: the model takes {wanted}", hint=f"give it {files}")
    if events is not None:
        return EventSource(Path(text), events, size)

    if (text == STDIN) != (size is not None):
        raise UsageError("--size: raw frames on stdin (--input -) need it, and of pictures nothing else takes it")
    if size is not None:
        if sys.stdin is None:
            raise InputError("stdin: is closed")
        os.set_blocking(sys.stdin.fileno(), True)  # else a frame that is not there yet reads as the end
        # A file of its own: a thread may still read when the interpreter ends, which closes sys.stdin.
        return RawSource(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), size, channels)
    if is_remote(text):
        return VideoSource(text)
    path = Path(text)
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise InputError(f"{text}: cannot be read ({error.strerror})") from error
    if folder:
        return FolderSource(path)
    return ArraySource(path) if path.suffix == ".npy" else VideoSource(text)


def is_remote(text: str) -> bool:
    """Whether this names a camera or a URL, which can be lost and opened again."""
    from stepcell.runtime.media.video_reader import CAMERA

    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) or CAMERA.fullmatch(text))


def shown(text: str) -> str:
    """A name for messages, metrics and reports: without the password of a URL, and Unicode.

    A file name may hold bytes that are no Unicode, which JSON cannot; they are written as escapes.
    """
    text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://[^/@:]*):[^/]*@", r"\1:***@", text)
    return text.encode(errors="backslashreplace").decode()


def parse_size(text: str) -> tuple[int, int]:
    """`640x480` as (width, height).

    Raises:
        UsageError: another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise UsageError(f"--size: expected WIDTHxHEIGHT, got {text!r}", hint="such as 640x480")
    return int(match[1]), int(match[2])


class ArraySource:
    """A .npy file: (T, H, W, C) uint8 pixels, or (T, C, H, W) floats already in the model's range."""

    fps: Fraction | None = None
    live = False
    seconds: float | None = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: not a readable .npy array ({error})") from error
        pixels = array.dtype == np.uint8
        if not (pixels or array.dtype.kind == "f") or array.ndim != 4:
            raise InputError(
                f"{path}: expected pixels (T, H, W, C) uint8 or tensors (T, C, H, W) float, "
                f"got {array.shape} {array.dtype}",
                hint="a greyscale clip (T, H, W) takes a channel axis: frames[..., None]" if array.ndim == 3 else None,
            )
        channels = array.shape[3 if pixels else 1]
        if channels not in (1, 3) or 0 in array.shape:
            raise InputError(
                f"{path}: expected 1 or 3 channels and at least one frame, got {array.shape} {array.dtype}"
            )
        self.length: int | None = len(array)
        self._path, self._shape, self._dtype, self._start = path, array.shape, array.dtype, array.offset
        # In Fortran order no frame is in one piece: the file is read as a whole.
        self._array = None if array.flags.c_contiguous else np.array(array)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        if self._array is not None:
            yield from self._array
            return
        # Read and not mapped: where a mapped file is cut off meanwhile, the process dies of SIGBUS.
        count, *shape = self._shape
        size = int(np.prod(shape)) * self._dtype.itemsize
        try:
            with self._path.open("rb") as file:
                file.seek(self._start)
                for number in range(count):
                    data = file.read(size)
                    if len(data) < size:
                        raise InputError(f"{self.name}: cut off at frame {number} of {count}")
                    yield np.frombuffer(data, self._dtype).reshape(shape)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror})") from error

    def close(self) -> None:
        pass


class RawSource:
    """Raw frames on a byte stream, row by row without gaps: rgb24 or gray8.

    Args:
        stream: such as `sys.stdin.buffer`; it is left open.
        size: (width, height).
        channels: 3 or 1.
    """

    fps: Fraction | None = None
    length: int | None = None
    live = True
    seconds: float | None = None  # when it came in

    def __init__(self, stream: BinaryIO, size: tuple[int, int], channels: int) -> None:
        self.name = "stdin"
        self._stream = stream
        self._shape = (size[1], size[0], channels)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        size = int(np.prod(self._shape))
        number = 0
        while data := self._read(size):
            if len(data) < size:
                raise InputError(
                    f"stdin: ended inside frame {number}: {len(data)} of {size} bytes",
                    hint=f"the sender must use {self._shape[1]}x{self._shape[0]} and {self._shape[2]} bytes a pixel",
                )
            self.seconds = time.monotonic()
            yield np.frombuffer(data, np.uint8).reshape(self._shape)
            number += 1

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            raise InputError(f"stdin: cannot be read ({error.strerror})") from error

    def close(self) -> None:
        pass
