"""RAW: the words a Prophesee camera sends, in one of two encodings.

Written after https://docs.prophesee.ai/stable/data/file_formats/raw.html and .../encoding_formats/
evt2.html and evt3.html. Words other than those that make events or time are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.events import CHUNK, Events, unwrap
from stepcell.runtime.media.events.evt3 import Evt3
from stepcell.runtime.media.events.header import read_header, read_records, size_of

__all__ = ["Evt2", "RawReader"]


class Decoder(Protocol):
    """Turns words into events; remembers what the next words refer to."""

    word: np.dtype[Any]

    def decode(self, words: NDArray[Any]) -> Events: ...


class RawReader:
    """The events of a RAW file, EVT 2.0 or EVT 3.0.

    Raises:
        InputError: the header names another encoding or none.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        self._file = file
        header = read_header(file)
        self.size = size_of(header)
        encoding = header.get("format", header.get("evt", "none"))
        match = re.match(r"(?:EVT)?([23])(?:\.0)?(?:;|$)", encoding)
        if match is None or "endianness=big" in encoding:
            raise InputError(
                f"{path}: encoding {encoding}: only EVT 2.0 and EVT 3.0, little-endian, are read",
                hint="Prophesee's tools turn a recording into DAT: metavision_file_to_dat",
            )
        self._decoder: Decoder = Evt2() if match[1] == "2" else Evt3()

    def __iter__(self) -> Iterator[Events]:
        for words in read_records(self._file, self.name, self._decoder.word, CHUNK):
            yield self._decoder.decode(words)

    def close(self) -> None:
        self._file.close()


class Evt2:
    """EVT 2.0: an event in 32 bits, the upper 28 bits of the time in words of their own."""

    word: np.dtype[Any] = np.dtype("<u4")

    def __init__(self) -> None:
        self._high: int | None = None  # counted on past 2 ** 28

    def decode(self, words: NDArray[Any]) -> Events:
        kind = words >> 28
        is_high = kind == 8
        seen = np.cumsum(is_high)  # time words up to here
        high = unwrap((words[is_high] & 0xFFFFFFF).astype(np.int64), 1 << 28, self._high)
        known = np.concatenate(([-1 if self._high is None else self._high], high))
        rows = np.flatnonzero((kind <= 1) & (known[seen] >= 0))  # without a time it is no event yet
        if len(high):
            self._high = int(high[-1])
        word = words[rows]
        t = known[seen[rows]] << 6 | (word >> 22 & 0x3F)
        return Events.of(word >> 11 & 0x7FF, word & 0x7FF, word >> 28, t)
