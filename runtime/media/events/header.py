"""What DAT and RAW files share: a header of text lines, then records of one size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError

__all__ = ["read_header", "read_records", "size_of"]

_LINES, _LENGTH = 1000, 10_000  # more is no header


def read_header(file: BinaryIO) -> dict[str, str]:
    """Lines `% key value` by key in lower case; the file is left where the data begin.

    The header ends with `% end`, or before the first line that does not begin with `% `.
    """
    header: dict[str, str] = {}
    for _ in range(_LINES):
        start = file.tell()
        if file.read(2) != b"% ":
            file.seek(start)
            break
        key, _, value = file.readline(_LENGTH).decode("latin-1").strip().partition(" ")
        if key.lower() == "end":
            break
        header[key.lower()] = value.strip()
    return header


def size_of(header: dict[str, str]) -> tuple[int, int] | None:
    """Width and height of the sensor; None where the header does not say."""
    text = header.get("geometry", "")
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text):
        return int(match[1]), int(match[2])
    found = dict(re.findall(r"(width|height)=(\d{1,5})", header.get("format", "")))
    width, height = (header.get(key) or found.get(key) or "" for key in ("width", "height"))
    return (int(width), int(height)) if re.fullmatch(r"\d{1,5} \d{1,5}", f"{width} {height}") else None


def read_records(file: BinaryIO, name: str, dtype: np.dtype[Any], count: int) -> Iterator[NDArray[Any]]:
    """The rest of a file in parts of up to `count` records.

    Raises:
        InputError: it cannot be read, or ends inside a record.
    """
    while True:
        try:
            data = file.read(count * dtype.itemsize)
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror})") from error
        whole = len(data) // dtype.itemsize
        if whole:
            yield np.frombuffer(data, dtype, whole)
        if rest := len(data) % dtype.itemsize:
            raise InputError(f"{name}: cut off: ends {rest} bytes into a record of {dtype.itemsize}")
        if whole < count:
            return
