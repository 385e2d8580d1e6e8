"""Where results go: video, folder of pictures, array or raw frames on stdout.

Every file is written under a temporary name. `close()` finishes it and moves it into place, also
when the stream broke half-way; `abandon()` removes it and leaves what was there before.
"""

from __future__ import annotations

import contextlib
import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import OutputError, UsageError
from stepcell.files import atomic_path

__all__ = ["ArraySink", "RawSink", "Sink", "TemporaryFile", "open_sink"]

STDOUT = "-"
VIDEOS = (".mp4", ".mkv", ".mov")


class Sink(Protocol):
    """Takes results one by one.

    Attributes:
        name: as the user wrote it; "stdout" for `-`.
        takes_pixels: whether `write` takes pixels (H, W, C) uint8, or the model's own tensors.
    """

    name: str
    takes_pixels: bool

    def write(self, frame: NDArray[Any]) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


def open_sink(text: str, fps: Fraction) -> Sink:
    """Open what the user named.

    Args:
        text: a .mp4/.mkv/.mov file, a .npy file, a folder (no suffix; new or empty), or `-` for stdout.
        fps: frame rate of a video.

    Raises:
        UsageError: another kind of file.
        OutputError: it cannot be written.
    """
    from stepcell.runtime.av_write import FolderSink, VideoSink

    if text == STDOUT:
        import sys

        if sys.stdout is None:
            raise OutputError("stdout: is closed", hint="--output FILE writes to a file")
        return RawSink(sys.stdout.buffer)
    path = Path(text)
    if path.suffix in VIDEOS:
        return VideoSink(path, fps)
    if path.suffix == ".npy":
        return ArraySink(path)
    if not path.suffix or _is_folder(path):
        return FolderSink(path)
    raise UsageError(
        f"--output: expected {', '.join(VIDEOS)}, .npy, a folder or -, got {text!r}",
        hint="a folder name has no suffix; it receives one .png per frame",
    )


class TemporaryFile:
    """A temporary path beside `path` that ends in its place or not at all."""

    def __init__(self, path: Path) -> None:
        self._stack = contextlib.ExitStack()
        self.path = self._stack.enter_context(atomic_path(path))

    def keep(self) -> None:
        """Move it into place."""
        self._stack.close()

    def drop(self) -> None:
        """Remove it, where the folder still lets it be removed."""
        with contextlib.suppress(_Dropped, OSError), self._stack:
            raise _Dropped


class _Dropped(Exception):
    """Tells `atomic_path` that the file is not wanted."""


class ArraySink:
    """A .npy file (T, ...) of the model's own numbers, grown frame by frame.

    The header is written last, when the number of frames is known, in the space left for it.
    """

    takes_pixels = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._temporary = TemporaryFile(path)
        self._file = self._temporary.path.open("wb")
        self._count = 0
        self._first: NDArray[Any] | None = None

    def write(self, frame: NDArray[Any]) -> None:
        with _writing(self.name):
            if self._first is None:
                self._first = frame
                self._file.write(_header(frame, 0))
            self._file.write(np.ascontiguousarray(frame).data)
        self._count += 1

    def close(self) -> None:
        with _writing(self.name):
            if self._first is not None:
                self._file.seek(0)
                self._file.write(_header(self._first, self._count))
            self._file.close()
        self._temporary.keep()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what waits to be written finds no room now either
            self._file.close()
        self._temporary.drop()


class RawSink:
    """Raw pixels to a byte stream: rgb24, or gray8 of a one-channel model."""

    takes_pixels = True

    def __init__(self, stream: BinaryIO) -> None:
        self.name = "stdout"
        self._stream = stream

    def write(self, frame: NDArray[Any]) -> None:
        with _writing(self.name):
            self._stream.write(np.ascontiguousarray(frame).data)

    def close(self) -> None:
        with _writing(self.name):
            self._stream.flush()

    def abandon(self) -> None:
        # A reader that went away would be reported a second time when Python closes stdout.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # nobody may look, or the name is too long; writing will say so
        return False


def _header(frame: NDArray[Any], count: int) -> bytes:
    """A .npy header of a length that does not depend on `count`: numpy leaves room for it to grow."""
    description = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(frame))
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {**description, "shape": (count, *frame.shape)})
    return buffer.getvalue()


@contextlib.contextmanager
def _writing(name: str) -> Any:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{name}: cannot be written ({error.strerror or error})") from error
