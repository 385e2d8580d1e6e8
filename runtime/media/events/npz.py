"""NPZ reader: .npz files with the arrays x, y, p and t, read part by part."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.library_errors import library_errors
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.reader import CHUNK, LARGEST

__all__ = ["NpzReader"]

_COLUMNS = ("x", "y", "p", "t")
_BLOCK = 1 << 16  # bytes read at a time: what is lost before the place where a file is damaged


class NpzReader:
    """The events of a .npz file.

    The arrays have one length: x and y integers; p bool, 0 and 1, or -1 and 1; t integers in microseconds or floats
    in seconds. The scalars `width` and `height`, the size of the sensor, are optional.

    Raises:
        InputError: an array is missing, or of another dtype or shape.
    """

    format = ".npz"

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        self._file = file
        with library_errors(str(path), InputError, what="not a readable .npz file"):
            self._zip = zipfile.ZipFile(file)
            members = set(self._zip.namelist())
            missing = [name for name in _COLUMNS if f"{name}.npy" not in members]
            if missing:
                raise InputError(
                    f"{path}: expected arrays x, y, p and t, missing {', '.join(missing)}",
                    hint=f"it holds {', '.join(sorted(members)) or 'nothing'}",
                )
            self._columns = {name: _Column(self._zip.open(f"{name}.npy"), f"{path}: {name}") for name in _COLUMNS}
            self.size = self._size() if {"width.npy", "height.npy"} <= members else None
        lengths = {name: column.length for name, column in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"{path}: x, y, p and t need the same length, got {lengths}")
        for name, kinds in (("x", "iu"), ("y", "iu"), ("p", "iub"), ("t", "iuf")):
            if self._columns[name].dtype.kind not in kinds:
                raise InputError(f"{path}: {name}: expected another dtype, got {self._columns[name].dtype}")
        self._left = lengths["t"]

    def __iter__(self) -> Iterator[Events]:
        number = 0
        while self._left > 0:
            count = min(CHUNK, self._left)
            columns = [self._columns[name] for name in _COLUMNS]
            x, y, p, t = (column.read(count) for column in columns)
            whole = min(map(len, (x, y, p, t)))
            error = next((column.error for column in columns if column.error is not None), None)
            x, y, p, t = x[:whole], y[:whole], p[:whole], t[:whole]
            impossible = self._impossible(p, t)
            if impossible is not None:
                row, text = impossible
                error = InputError(f"{self.name}: event {number + row}: {text}")
                x, y, p, t = x[:row], y[:row], p[:row], t[:row]
            if t.dtype.kind == "f":
                t = np.rint(t.astype(np.float64) * 1e6)
            yield Events(x, y, p.astype(np.int8) > 0, t.astype(np.int64))
            if error is not None:
                raise error
            self._left -= count
            number += count

    def close(self) -> None:
        self._zip.close()
        self._file.close()

    def _impossible(self, p: NDArray[Any], t: NDArray[Any]) -> tuple[int, str] | None:
        """The first event whose polarity or time has no meaning, and what is wrong with it."""
        found = []
        known = np.isin(p, (-1, 0, 1))
        if not known.all():
            row = int(known.argmin())
            found.append((row, f"p: expected 0 and 1, or -1 and 1, got {p[row]}"))
        if t.dtype.kind == "f" and not (known := np.abs(t) < 1e12).all():
            row = int(known.argmin())
            found.append((row, f"t: expected seconds, at most 1e12, got {t[row]}"))
        return min(found, default=None)

    def _size(self) -> tuple[int, int]:
        sides = []
        for name in ("width", "height"):
            column = _Column(self._zip.open(f"{name}.npy"), f"{self.name}: {name}")
            side = column.read(1)
            if column.error is not None:
                raise column.error
            if side.dtype.kind not in "iuf" or not 0 < side[0] <= LARGEST:
                raise InputError(f"{self.name}: {name}: expected 1 to {LARGEST} pixels, got {side[0]}")
            sides.append(int(side[0]))
        return sides[0], sides[1]


class _Column:
    """A .npy member of the archive, read piece by piece."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self.error: InputError | None = None
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, self.dtype = read(file)
        if len(shape) > 1 or self.dtype.hasobject:
            raise InputError(f"{name}: expected one number per event, got {shape} {self.dtype}")
        self.length = int(shape[0]) if shape else 1

    def read(self, count: int) -> NDArray[Any]:
        """The next `count` numbers; fewer where the file is damaged, and then `error` says how."""
        size, data = count * self.dtype.itemsize, bytearray()
        try:
            with library_errors(self._name, InputError, what="broken or truncated"):
                while len(data) < size:
                    block = self._file.read(min(_BLOCK, size - len(data)))
                    if not block:
                        raise EOFError(f"{len(data)} of {size} bytes")
                    data += block
        except InputError as error:
            self.error = error
        return np.frombuffer(data, self.dtype, len(data) // self.dtype.itemsize)
