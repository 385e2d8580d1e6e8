"""Prophesee file layout, shared by DAT and RAW: a text header, then records of one size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.byte_stream import ByteStream

__all__ = ["read_header", "read_records", "sensor_size"]

_MAX_LINES, _MAX_LENGTH = 1000, 10_000  # limits, so that a file of another format is not read as one long header


def read_header(file: BinaryIO | ByteStream) -> dict[str, str]:
    """Read the lines `% key value` of the header; keys are returned in lower case.

    The header ends with `% end`, or before the first line that does not begin with `% `. The file is left at the
    first byte after it.
    """
    header: dict[str, str] = {}
    for _ in range(_MAX_LINES):
        start = file.tell()
        if file.read(2) != b"% ":
            file.seek(start)
            break
        key, _, value = file.readline(_MAX_LENGTH).decode("latin-1").strip().partition(" ")
        if key.lower() == "end":
            break
        header[key.lower()] = value.strip()
    return header


def sensor_size(header: dict[str, str]) -> tuple[int, int] | None:
    """(width, height) of the sensor in pixels; None: the header does not say."""
    text = header.get("geometry", "")
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text):
        return int(match[1]), int(match[2])
    found = dict(re.findall(r"(width|height)=(\d{1,5})", header.get("format", "")))
    width, height = (header.get(key) or found.get(key) or "" for key in ("width", "height"))
    return (int(width), int(height)) if re.fullmatch(r"\d{1,5} \d{1,5}", f"{width} {height}") else None


def read_records(file: BinaryIO | ByteStream, name: str, dtype: np.dtype[Any], count: int) -> Iterator[NDArray[Any]]:
    """Read the rest of a file in parts of up to `count` records; of a stream, a part is empty where nothing came.

    Raises:
        InputError: the file cannot be read, or ends inside a record.
    """
    rest = b""
    while (data := _read(file, name, count * dtype.itemsize)) != b"":
        if data is None:
            yield np.empty(0, dtype)
            continue
        data = rest + data
        whole = len(data) // dtype.itemsize
        rest = data[whole * dtype.itemsize :]
        if whole:
            yield np.frombuffer(data, dtype, whole)
    if rest:
        raise InputError(f"{name}: truncated: ends {len(rest)} bytes into a record of {dtype.itemsize}")


def _read(file: BinaryIO | ByteStream, name: str, size: int) -> bytes | None:
    if isinstance(file, ByteStream):
        return file.read_available(size)
    try:
        return file.read(size)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
