"""AEDAT4 reader: iniVation's files of DV cameras, through the package aedat.

aedat needs numpy only, has wheels for x86-64 and aarch64, and agrees event for event with the other public readers.
https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-4.0.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stepcell.errors import InputError
from stepcell.optional_imports import require
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.library_reader import choose_stream, read_from, reading

__all__ = ["Aedat4Reader"]


_MAGIC = b"#!AER-DAT4.0\r\n"
_COMPRESSIONS, _MOST = 5, 1 << 24  # kinds of compression; bytes of a header


class Aedat4Reader:
    """The events of an AEDAT4 file; frames, IMU samples and triggers are skipped.

    Args:
        path: the file.
        file: the same file, open; the package opens it again.
        stream: number of the stream of events; None: the only one.

    Raises:
        InputError: not an AEDAT4 file, or without events.
        UsageError: several streams of events, or not the one that was asked for.
        MissingDependencyError: aedat is not installed.
    """

    format = "AEDAT4"

    def __init__(self, path: Path, file: BinaryIO, stream: str | None = None) -> None:
        self.name = str(path)
        with file:
            _check_header(self.name, file)
        aedat = require("aedat", extra="aedat4", purpose="reading .aedat4")
        with reading(self.name, "not a readable AEDAT4 file"):
            self._decoder = aedat.Decoder(str(path))
            streams = self._decoder.id_to_stream()
        found = {str(number): each for number, each in streams.items() if each["type"] == "events"}
        chosen = choose_stream(self.name, sorted(found), stream, kind="stream")
        self._stream = int(chosen)
        width, height = found[chosen].get("width"), found[chosen].get("height")
        self.size: tuple[int, int] | None = (width, height) if width and height else None

    def __iter__(self) -> Iterator[Events]:
        for packet in read_from(iter(self._decoder), self.name):
            if packet["stream_id"] == self._stream and "events" in packet:
                found = packet["events"]
                yield Events.of(found["x"], found["y"], found["on"], found["t"])

    def close(self) -> None:
        self._decoder = None


def _check_header(name: str, file: BinaryIO) -> None:
    """Check the header: its length, and a FlatBuffer of compression, position of the last table and description.

    aedat follows its offsets unchecked, and a damaged one can end the process.
    """
    magic, length = file.read(len(_MAGIC)), int.from_bytes(file.read(4), "little")
    data = file.read(min(length, _MOST))
    try:
        if magic != _MAGIC or len(data) != length:
            raise ValueError("magic number or length")
        (table,) = struct.unpack_from("<I", data)
        vtable = table - struct.unpack_from("<i", data, table)[0]
        size, extent = struct.unpack_from("<HH", data, vtable)
        if vtable < 0 or size % 2 or size > 64 or vtable + size > length or table + extent > length:
            raise ValueError("table of fields")
        offsets = struct.unpack_from(f"<{(size - 4) // 2}H", data, vtable + 4)
        if any(offset >= extent for offset in offsets):
            raise ValueError("offset of a field")
        compression, _, text = (*offsets, 0, 0, 0)[:3]
        if compression and not 0 <= struct.unpack_from("<i", data, table + compression)[0] < _COMPRESSIONS:
            raise ValueError("compression")
        start = table + text + struct.unpack_from("<I", data, table + text)[0]
        (count,) = struct.unpack_from("<I", data, start)
        if not text or start + 4 + count >= length:
            raise ValueError("description")
        data[start + 4 : start + 4 + count].decode()
    except (ValueError, struct.error) as error:
        raise InputError(f"{name}: not a readable AEDAT4 file: damaged header ({error})") from error
