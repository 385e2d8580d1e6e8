"""NPY reader: .npy files of one structured array with the fields x, y, p and t, read part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stepcell.errors import InputError
from stepcell.library_errors import library_errors
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.header import read_records
from stepcell.runtime.media.events.library_reader import events_of
from stepcell.runtime.media.events.names import columns_named
from stepcell.runtime.media.events.reader import CHUNK

__all__ = ["StructuredNpyReader"]


class StructuredNpyReader:
    """The events of a .npy file, as `EventsIterator` of OpenEB, tonic and others save them.

    Raises:
        InputError: not a .npy file, or an array without the four fields.
    """

    format = "structured .npy"
    size: tuple[int, int] | None = None

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        self._file = file
        with library_errors(self.name, InputError, what="not a readable .npy array"):
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, self._dtype = read(file)
        fields = columns_named(self._dtype.names or ())
        if fields is None or len(shape) != 1 or self._dtype.hasobject:
            raise InputError(
                f"{path}: expected a structured array (N,) with the fields x, y, p and t, got {shape} {self._dtype}",
                hint="np.savez(FILE, x=..., y=..., p=..., t=...) stores columns",
            )
        self._fields = fields
        self._length = int(shape[0])

    def __iter__(self) -> Iterator[Events]:
        number = 0
        for records in read_records(self._file, self.name, self._dtype, CHUNK):
            records = records[: self._length - number]
            yield from events_of(self.name, number, *(records[field] for field in self._fields))
            number += len(records)
        if number < self._length:
            raise InputError(f"{self.name}: truncated: {number} of {self._length} events")

    def close(self) -> None:
        self._file.close()
