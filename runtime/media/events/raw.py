"""RAW reader: Prophesee's files of encoded events, EVT 2.0 or EVT 3.0.

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
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.evt2 import Evt2
from stepcell.runtime.media.events.evt3 import Evt3
from stepcell.runtime.media.events.header import read_header, read_records, sensor_size
from stepcell.runtime.media.events.reader import CHUNK

__all__ = ["RawReader"]


class _Decoder(Protocol):
    """Converts words to events; keeps the fields that apply to the words of the next part."""

    word: np.dtype[Any]

    def decode(self, words: NDArray[Any]) -> Events: ...


class RawReader:
    """The events of a RAW file.

    Raises:
        InputError: the header names another encoding or none.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        self._file = file
        header = read_header(file)
        self.size = sensor_size(header)
        encoding = header.get("format", header.get("evt", "none"))
        match = re.match(r"(?:EVT)?([23])(?:\.0)?(?:;|$)", encoding)
        if match is None or "endianness=big" in encoding:
            raise InputError(
                f"{path}: encoding {encoding}: only EVT 2.0 and EVT 3.0, little-endian, are read",
                hint="convert the recording to DAT with Prophesee's metavision_file_to_dat",
            )
        self._decoder: _Decoder = Evt2() if match[1] == "2" else Evt3()

    def __iter__(self) -> Iterator[Events]:
        for words in read_records(self._file, self.name, self._decoder.word, CHUNK):
            yield self._decoder.decode(words)

    def close(self) -> None:
        self._file.close()
