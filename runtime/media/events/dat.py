"""DAT reader and writer: Prophesee's format of decoded events, version 2.

A text header, two bytes for the type and size of a record, then records of 8 bytes, little-endian: time in
microseconds (32 bits), x (14 bits), y (14 bits), polarity (1 bit).
https://docs.prophesee.ai/stable/data/file_formats/dat.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stepcell.errors import InputError, OutputError
from stepcell.files import atomic_path
from stepcell.runtime.media.events.byte_stream import ByteStream
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.header import read_header, read_records, sensor_size
from stepcell.runtime.media.events.reader import CHUNK, unwrap_counter

__all__ = ["DatReader", "write_dat"]

_RECORD = np.dtype([("t", "<u4"), ("xyp", "<u4")])
_TYPES = (0x00, 0x0C)  # event of an unspecified kind, contrast detection (CD)
_PERIOD = 1 << 32  # microseconds until the time wraps: 71 minutes


class DatReader:
    """The events of a DAT file.

    Args:
        path: of the file, or the name of a stream.
        file: to read.
        header: if it was read before.

    Raises:
        InputError: a file of another format, version or record type.
    """

    format = "DAT"

    def __init__(self, path: Path | str, file: BinaryIO | ByteStream, header: dict[str, str] | None = None) -> None:
        self.name = str(path)
        self._file = file
        header = read_header(file) if header is None else header
        if header.get("version", "2") != "2":
            raise InputError(
                f"{path}: DAT version {header['version']}, expected 2",
                hint="convert it with Prophesee's tools, or to .npz (docs/events.md)",
            )
        self.size = sensor_size(header)
        kind = file.read(2)
        if not header or len(kind) < 2 or kind[0] not in _TYPES or kind[1] != _RECORD.itemsize:
            raise InputError(f"{path}: not a DAT file of events: header {header or 'missing'}, type {list(kind)}")

    def __iter__(self) -> Iterator[Events]:
        last = None
        for records in read_records(self._file, self.name, _RECORD, CHUNK):
            if not len(records):
                yield Events.empty(0)
                continue
            word = records["xyp"]
            t = unwrap_counter(records["t"].astype(np.int64), _PERIOD, last)
            last = int(t[-1])
            yield Events.of(word & 0x3FFF, word >> 14 & 0x3FFF, word >> 28 & 1, t)

    def close(self) -> None:
        self._file.close()


def write_dat(path: Path, parts: Iterable[Events], size: tuple[int, int]) -> int:
    """Write events to a DAT file; returns their number.

    Args:
        path: path of the file.
        parts: events in order of time.
        size: (width, height) of the sensor in pixels.

    Raises:
        OutputError: the file cannot be written, or a time is negative.
    """
    count = 0
    header = f"% Data file containing CD events\n% Version 2\n% Width {size[0]}\n% Height {size[1]}\n"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header.encode() + bytes([_TYPES[1], _RECORD.itemsize]))
        for events in parts:
            if len(events) and events.t[0] < 0:
                raise OutputError(f"{path}: DAT cannot store a negative time, got {events.t[0]} us")
            records = np.empty(len(events), _RECORD)
            records["t"] = events.t % _PERIOD
            records["xyp"] = events.x | events.y.astype(np.uint32) << 14 | events.p.astype(np.uint32) << 28
            file.write(records.tobytes())
            count += len(events)
    return count
