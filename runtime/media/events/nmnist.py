"""N-MNIST reader: .bin files of the sets N-MNIST and N-Caltech101 (Orchard et al. 2015).

Records of 5 bytes, the most significant first: x (8 bits), y (8 bits), polarity (1 bit), microseconds (23 bits). One
with y = 240 is no event: the time of those after it is 2 ** 13 us later.
https://www.garrickorchard.com/datasets/n-mnist
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.header import read_records
from stepcell.runtime.media.events.reader import CHUNK

__all__ = ["NMnistReader"]

_RECORD = np.dtype([("x", "u1"), ("y", "u1"), ("pt", "u1", 3)])
_OVERFLOW, _STEP = 240, 1 << 13  # y of a record that counts, and the microseconds that it stands for


class NMnistReader:
    """The events of an N-MNIST file, which does not state its sensor: 34x34 in N-MNIST."""

    format = "N-MNIST"
    size: tuple[int, int] | None = None

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        self._file = file

    def __iter__(self) -> Iterator[Events]:
        late = 0
        for records in read_records(self._file, self.name, _RECORD, CHUNK):
            word = records["pt"].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
            overflow = records["y"] == _OVERFLOW
            counted = late + np.cumsum(overflow) * _STEP
            late = int(counted[-1])
            keep = ~overflow
            yield Events.of(
                records["x"][keep], records["y"][keep], word[keep] >> 23, (word[keep] & 0x7FFFFF) + counted[keep]
            )

    def close(self) -> None:
        self._file.close()
