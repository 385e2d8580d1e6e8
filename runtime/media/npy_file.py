"""NumPy .npy files as source and sink."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError
from stepcell.library_errors import library_errors
from stepcell.runtime.media.npy_header import array_header
from stepcell.runtime.media.sink import output_errors
from stepcell.runtime.media.source import Source
from stepcell.runtime.media.temporary_file import TemporaryFile

__all__ = ["ArraySink", "ArraySource"]


class ArraySource(Source):
    """A .npy file of pixels (T, H, W, C) uint8, or of tensors (T, C, H, W) float with the values that it takes.

    Args:
        nv12: the model takes NV12, so an array (T, H * 3 // 2, W) uint8 is that.

    Raises:
        InputError: not a .npy file, or an array of another shape or dtype.
    """

    def __init__(self, path: Path, *, nv12: bool = False) -> None:
        self.name = str(path)
        with library_errors(str(path), InputError, what="not a readable .npy array"):
            array = np.lib.format.open_memmap(path, mode="r")
        pixels = array.dtype == np.uint8
        planes = nv12 and pixels and array.ndim == 3 and 0 not in array.shape
        if not planes and (not (pixels or array.dtype.kind == "f") or array.ndim != 4):
            raise InputError(
                f"{path}: expected pixels (T, H, W, C) uint8 or tensors (T, C, H, W) float, "
                f"got {array.shape} {array.dtype}",
                hint="add a channel axis to a greyscale clip (T, H, W): frames[..., None]" if array.ndim == 3 else None,
            )
        channels = 3 if planes else array.shape[3 if pixels else 1]
        if channels not in (1, 3, 4) or 0 in array.shape:
            raise InputError(
                f"{path}: expected {'(T, H, W, C) uint8' if pixels else '(T, C, H, W) of floats'} with 1, 3 or 4 "
                f"channels and at least one frame, got {array.shape} {array.dtype}",
                hint="put the channels first: frames.transpose(0, 3, 1, 2)" if array.shape[3] in (1, 3, 4) else None,
            )
        self.pixels = pixels
        self.length = len(array)
        self._path, self._shape, self._dtype, self._start = path, array.shape, array.dtype, array.offset
        # In Fortran order the values of one frame are not contiguous, so the whole file is loaded.
        with library_errors(str(path), InputError):
            self._array = None if array.flags.c_contiguous else np.array(array)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        if self._array is not None:
            yield from self._array
            return
        # Read instead of memory-mapped: truncating a mapped file would kill the process with SIGBUS.
        count, *shape = self._shape
        size = int(np.prod(shape)) * self._dtype.itemsize
        try:
            with self._path.open("rb") as file:
                file.seek(self._start)
                for number in range(count):
                    data = file.read(size)
                    if len(data) < size:
                        raise InputError(f"{self.name}: truncated at frame {number} of {count}")
                    yield np.frombuffer(data, self._dtype).reshape(shape)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror})") from error


class ArraySink:
    """A .npy file (T, ...) of output tensors, appended frame by frame.

    Space for the header is reserved at the start of the file; the header is written last, when the number of
    frames is known. Writes are unbuffered, so that after an error the number of complete frames is known.

    Raises:
        OutputError: the file cannot be created.
    """

    takes_pixels = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._temporary = TemporaryFile(path)
        self.replaces = self._temporary.replaces
        self._file = self._temporary.path.open("wb", buffering=0)
        self._count = 0
        self._first: NDArray[Any] | None = None

    def write(self, frame: NDArray[Any]) -> None:
        if self._first is not None and frame.shape != self._first.shape:
            raise OutputError(
                f"{self.name}: frame {self._count} has shape {frame.shape}, the first one {self._first.shape}",
                hint="--resize WIDTHxHEIGHT brings all frames to one size",
            )
        with output_errors(self.name):
            if self._first is None:
                self._first = frame
                self._write_all(_header(frame, 0))
            self._write_all(np.ascontiguousarray(frame).reshape(-1).view(np.uint8).data)
        self._count += 1

    def _write_all(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered write may write only a part, as on a disk that is nearly full
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        with output_errors(self.name):
            if self._first is not None:
                self._file.seek(0)
                self._write_all(_header(self._first, self._count))
            self._file.close()
        try:
            self._temporary.keep()
        finally:
            if self._temporary.kept:
                self.name = str(self._temporary.path)

    def salvage(self) -> int:
        if self._temporary.kept:
            return self._count
        if self._first is not None and self._count:
            with contextlib.suppress(OSError, ValueError, OutputError):  # ValueError: `close` had closed the file
                self._file.truncate(len(_header(self._first, self._count)) + self._count * self._first.nbytes)
                self.close()
                return self._count
        self.abandon()
        return 0

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.delete()


def _header(frame: NDArray[Any], count: int) -> bytes:
    return array_header(frame.dtype, (count, *frame.shape))
