"""EVT 3.0: words of 16 bits, each of which changes one thing of what the next ones mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.events import Events, unwrap

__all__ = ["Evt3"]

_Y, _X, _BASE, _VECTOR_12, _VECTOR_8, _LOW, _HIGH = 0, 2, 3, 4, 5, 6, 8  # the upper four bits


class Evt3:
    """Decodes part after part of a stream.

    A word for y, for the base of a vector or for either half of the time holds until the next of
    its kind, so what holds at the end of one part is put before the next one.
    """

    word: np.dtype[Any] = np.dtype("<u2")

    def __init__(self) -> None:
        self._high: int | None = None  # counted on past 2 ** 12
        self._low = 0
        self._y: int | None = None
        self._base, self._base_p = 0, 0

    def decode(self, words: NDArray[Any]) -> Events:
        kind, value = words >> 12, (words & 0xFFF).astype(np.int64)
        t = self._times(kind, value)
        y = _held(kind == _Y, value & 0x7FF, -1 if self._y is None else self._y)
        x, base_p = self._bases(kind, value)
        self._y = int(y[-1]) if y[-1] >= 0 else None
        single = kind == _X
        x[single] = value[single] & 0x7FF
        p = np.where(single, value >> 11, base_p)
        # One event is a vector of one.
        valid = np.where(single, 1, np.where(kind == _VECTOR_12, value, np.where(kind == _VECTOR_8, value & 0xFF, 0)))
        rows = np.flatnonzero((valid > 0) & (t >= 0) & (y >= 0))  # without a time or a row it is no event yet
        row, offset = np.nonzero(valid[rows, None] >> np.arange(12) & 1)
        rows = rows[row]
        return Events.of(x[rows] + offset, y[rows], p[rows], t[rows])

    def _times(self, kind: NDArray[Any], value: NDArray[np.int64]) -> NDArray[np.int64]:
        """Microseconds at every word; below zero before the first."""
        is_high = kind == _HIGH
        highs = unwrap(value[is_high], 1 << 12, self._high)
        before = -1 if self._high is None else self._high
        known = np.concatenate(([before], highs))
        high = known[np.cumsum(is_high)]
        # The lower half starts at zero when the upper one has moved on, until its next word.
        moved = np.zeros(len(kind), np.bool_)
        moved[np.flatnonzero(is_high)[np.diff(known) != 0]] = True
        low = _held((kind == _LOW) | moved, np.where(moved, 0, value), self._low)
        self._low = int(low[-1])
        self._high = int(high[-1]) if high[-1] >= 0 else None
        return np.where(high < 0, -1, high << 12 | low)

    def _bases(self, kind: NDArray[Any], value: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Base x and polarity that hold at every word: each vector moves the base on by its length."""
        is_base = kind == _BASE
        length = np.where(kind == _VECTOR_12, 12, np.where(kind == _VECTOR_8, 8, 0))
        passed = np.cumsum(length) - length  # by the vectors before this word
        start = _held(is_base, (value & 0x7FF) - passed, self._base)
        polarity = _held(is_base, value >> 11, self._base_p)
        x = start + passed
        self._base, self._base_p = int(x[-1] + length[-1]), int(polarity[-1])
        return x, polarity


def _held(given: NDArray[np.bool_], values: NDArray[np.int64], before: int) -> NDArray[np.int64]:
    """At every place the last value that was given, `before` where there is none yet."""
    known = np.concatenate(([before], values[given]))
    result: NDArray[np.int64] = known[np.cumsum(given)]
    return result
