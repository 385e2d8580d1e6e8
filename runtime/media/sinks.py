"""Where results go: video, folder of pictures, array or raw frames on stdout.

Every file is written under a temporary name. `close()` finishes it and moves it into place, also
when the stream broke half-way; `salvage()` does so with what is whole of it after a full disk;
`abandon()` removes it and leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import OutputError, UsageError
from stepcell.files import atomic_path

__all__ = ["ArraySink", "RawSink", "Sink", "TemporaryFile", "open_sink", "writing"]

STDOUT = "-"
VIDEOS = (".mp4", ".mkv", ".mov")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sink(Protocol):
    """Takes results one by one.

    Attributes:
        name: as the user wrote it; "stdout" for `-`.
        takes_pixels: whether `write` takes pixels (H, W, C) uint8, or the model's own tensors.
        replaces: whether `close` and `salvage` put it in place of a file that was there before.
    """

    name: str
    takes_pixels: bool
    replaces: bool

    def write(self, frame: NDArray[Any]) -> None: ...

    def close(self) -> None: ...

    def salvage(self) -> int:
        """After a `write` or `close` that raised: keep the frames that are whole. How many; 0: as `abandon`."""
        ...

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
    from stepcell.runtime.media.video_writer import FolderSink, VideoSink

    if text == STDOUT:
        import sys

        if sys.stdout is None:
            raise OutputError("stdout: is closed", hint="--output FILE writes to a file")
        # A file of its own: a thread may still write when the process ends, and holds a lock of the file then.
        return RawSink(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
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
    """A temporary path beside `path` that ends in its place or not at all.

    Attributes:
        replaces: whether a file was there when this was made.
    """

    def __init__(self, path: Path) -> None:
        self._stack = contextlib.ExitStack()
        self.path = self._stack.enter_context(atomic_path(path))
        self.replaces = path.exists()

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

    The header is written last, when the number of frames is known, in the space left for it. There is no
    buffer, so that of every frame it is known whether it is in the file.
    """

    takes_pixels = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._temporary = TemporaryFile(path)
        self.replaces = self._temporary.replaces
        self._file = self._temporary.path.open("wb", buffering=0)
        self._count = 0
        self._first: NDArray[Any] | None = None

    def write(self, frame: NDArray[Any]) -> None:
        with writing(self.name):
            if self._first is None:
                self._first = frame
                self._put(_header(frame, 0))
            self._put(np.ascontiguousarray(frame).tobytes())
        self._count += 1

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        with writing(self.name):
            if self._first is not None:
                self._file.seek(0)
                self._put(_header(self._first, self._count))
            self._file.close()
        self._temporary.keep()

    def salvage(self) -> int:
        if self._first is not None and self._count:
            with contextlib.suppress(OSError, ValueError, OutputError):  # ValueError: `close` failed later
                self._file.truncate(len(_header(self._first, self._count)) + self._count * self._first.nbytes)
                self.close()
                return self._count
        self.abandon()
        return 0

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.drop()


class RawSink:
    """Raw pixels to a byte stream: rgb24, or gray8 of a one-channel model."""

    takes_pixels = True
    replaces = False

    def __init__(self, stream: BinaryIO) -> None:
        self.name = "stdout"
        self._stream = stream

    def write(self, frame: NDArray[Any]) -> None:
        with writing(self.name):
            self._stream.write(np.ascontiguousarray(frame).data)

    def close(self) -> None:
        with writing(self.name):
            self._stream.flush()

    def salvage(self) -> int:
        self.abandon()
        return 0  # nobody knows what its reader has

    def abandon(self) -> None:
        # A reader that went away would be reported a second time when Python closes the stream.
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
def writing(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns OSError and these errors in the block into OutputError."""
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except caught as error:
        full = getattr(error, "errno", None) in NO_ROOM
        raise OutputError(
            f"{name}: cannot be written ({getattr(error, 'strerror', None) or error})",
            hint="make room there, or write elsewhere" if full else None,
        ) from error
