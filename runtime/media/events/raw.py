"""RAW reader: Prophesee's files of encoded events, EVT 2.0, EVT 2.1 or EVT 3.0.

https://docs.prophesee.ai/stable/data/file_formats/raw.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.byte_stream import ByteStream
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.evt2 import Evt2
from stepcell.runtime.media.events.evt3 import Evt3
from stepcell.runtime.media.events.evt21 import Evt21
from stepcell.runtime.media.events.header import read_header, read_records, sensor_size
from stepcell.runtime.media.events.reader import CHUNK
from stepcell.runtime.media.events.sensors import byte_order, known_sensor

__all__ = ["RawReader"]


class _Decoder(Protocol):
    """Converts words to events; keeps the fields that apply to the words of the next part."""

    word: np.dtype[Any]

    def decode(self, words: NDArray[Any]) -> Events: ...


class RawReader:
    """The events of a RAW file.

    Args:
        path: of the file, or the name of a stream.
        file: to read.
        header: if it was read before.

    Raises:
        InputError: the header names another encoding or none.
    """

    def __init__(self, path: Path | str, file: BinaryIO | ByteStream, header: dict[str, str] | None = None) -> None:
        self.name = str(path)
        self._file = file
        header = read_header(file) if header is None else header
        sensor = known_sensor(header)
        self.size = sensor_size(header) or (sensor.size if sensor else None)
        encoding = header.get("format") or header.get("evt") or (sensor.encoding if sensor else "")
        if not encoding:
            raise InputError(
                f"{path}: not a RAW file of events: its header names no encoding",
                hint="a RAW file begins with lines such as `% evt 3.0`; docs/events.md lists the suffixes of others",
            )
        match = re.match(r"(?:EVT)?(2\.?1|[23])(?:\.0)?(?:;|$)", encoding)
        order = byte_order(header, encoding)
        if match is None or order not in ("little", "legacy"):
            big = f", {order}-endian" if order == "big" else ""
            raise InputError(
                f"{path}: encoding {encoding}{big}: only EVT 2.0, 2.1 and 3.0, little-endian, are read",
                hint=f"convert the recording to DAT with Prophesee's tools: metavision_file_to_dat -i {path}",
            )
        number = match[1].replace(".", "")
        self.format = f"RAW, EVT {number[0]}.{number[1:] or 0}"
        if number == "21":
            legacy = order == "legacy"
            self.format += " legacy" if legacy else " little-endian"
            self._decoder: _Decoder = Evt21(legacy=legacy)
        else:
            self._decoder = Evt2() if number == "2" else Evt3()

    def __iter__(self) -> Iterator[Events]:
        for words in read_records(self._file, self.name, self._decoder.word, CHUNK):
            yield self._decoder.decode(words) if len(words) else Events.empty(0)

    def close(self) -> None:
        self._file.close()
