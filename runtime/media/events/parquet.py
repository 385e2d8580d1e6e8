"""Parquet reader: tables with the columns x, y, p and t, through the package pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stepcell.errors import InputError
from stepcell.optional_imports import require
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.library_reader import events_of, read_from, reading
from stepcell.runtime.media.events.names import columns_named
from stepcell.runtime.media.events.reader import CHUNK

__all__ = ["ParquetReader"]


class ParquetReader:
    """The events of a Parquet file.

    Raises:
        InputError: not a Parquet file, or a table without the four columns.
        MissingDependencyError: pyarrow is not installed.
    """

    format = "Parquet"
    size: tuple[int, int] | None = None

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        parquet = require("pyarrow.parquet", extra="parquet", purpose="reading .parquet")
        with reading(self.name, "not a readable Parquet file"):
            self._table = parquet.ParquetFile(file)
            names = self._table.schema_arrow.names
        self._file = file
        fields = columns_named(names)
        if fields is None:
            raise InputError(f"{path}: expected columns x, y, p and t", hint=f"it has {', '.join(names) or 'none'}")
        self._fields = fields

    def __iter__(self) -> Iterator[Events]:
        number = 0
        for batch in read_from(self._table.iter_batches(CHUNK, columns=list(self._fields)), self.name):
            with reading(self.name, "unexpected values"):
                columns = [batch.column(field).to_numpy(zero_copy_only=False) for field in self._fields]
            columns[3] = columns[3].astype("M8[us]").astype("i8") if columns[3].dtype.kind == "M" else columns[3]
            yield from events_of(self.name, number, *columns)
            number += len(columns[0])

    def close(self) -> None:
        self._table.close()
        self._file.close()
