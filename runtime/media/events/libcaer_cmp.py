"""libcaer_cmp decoder: 16-bit words of ROS drivers of iniVation cameras, much like EVT 3.0 with columns for rows.

The upper four bits of a word are its type: 0 and 1 the upper and the lower 12 bits of the time since the time base of
the message, in microseconds; 2 the column; 3 an event, its row and polarity; 4 row and polarity of a vector; 5 a
vector, a bit for each of 8 rows from there on. Column and vector apply until the next word of their type, time within
a message.
https://github.com/ros-event-camera/event_camera_codecs (libcaer_cmp_types.h, libcaer_cmp_decoder.h)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.columns import Events

__all__ = ["LibcaerCmp"]

_HIGH, _LOW, _X, _Y, _BASE, _VECTOR = range(6)
Words = NDArray[np.int64]


class LibcaerCmp:
    """Decodes messages in their order; words of other types are skipped."""

    word: np.dtype[Any] = np.dtype("<u2")

    def __init__(self) -> None:
        self._x, self._base = 0, 0

    def decode(self, words: NDArray[Any], time_base: int) -> Events:
        """The events of a message, whose time base is in microseconds."""
        if not len(words):
            return Events.join([])
        kind, value = (words >> 12).astype(np.int64), (words & 0xFFF).astype(np.int64)
        t = time_base + (_last(kind == _HIGH, value << 12, 0) | _last(kind == _LOW, value, 0))
        x = _last(kind == _X, value & 0x7FF, self._x)
        vector = kind == _VECTOR
        before = np.cumsum(vector) - vector  # vectors before each word
        start = _last(kind == _BASE, before, 0)
        base = _last(kind == _BASE, value, self._base)  # row, and polarity in bit 11
        row = (base & 0x7FF) + 8 * (before - start)
        self._x = int(x[-1])
        self._base = int(base[-1]) & 0x800 | (int(row[-1]) + 8 * int(vector[-1])) & 0x7FF
        single = kind == _Y
        bits = np.where(single, 1, np.where(vector, value & 0xFF, 0)).astype(np.uint8)
        rows = np.flatnonzero(bits)
        place, offset = np.nonzero(np.unpackbits(bits[rows, None], axis=1, bitorder="little"))
        at = rows[place]
        y, p = np.where(single, value & 0x7FF, row), np.where(single, value, base) >> 11 & 1
        return Events.of(x[at], y[at] + offset, p[at], t[at])


def _last(marks: NDArray[np.bool_], values: Words, first: int) -> Words:
    """For each word the value of the last marked one up to it; `first` before there is one."""
    index = np.maximum.accumulate(np.where(marks, np.arange(len(marks)), -1))
    return np.where(index >= 0, values[index], first)
