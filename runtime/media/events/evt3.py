"""EVT 3.0 decoder: 16-bit words, each of which sets one field of the events that follow.

https://docs.prophesee.ai/stable/data/encoding_formats/evt3.html
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.compiled import compiled_loops
from stepcell.runtime.media.events.reader import unwrap_counter

__all__ = ["Evt3"]

# Type of a word, its upper four bits.
_Y, _X, _VECTOR_BASE, _VECTOR_12, _VECTOR_8, _TIME_LOW, _TIME_HIGH = 0, 2, 3, 4, 5, 6, 8

# The bits of every mask of 12: their number, and where their positions begin in one list of all.
_COUNT = np.array([bin(mask).count("1") for mask in range(1 << 12)])
_FIRST = np.cumsum(_COUNT) - _COUNT
_OFFSETS = np.nonzero(np.arange(1 << 12)[:, None] >> np.arange(12) & 1)[1]


class Evt3:
    """Decodes a stream part by part; words of other types are skipped.

    A row, a vector base and each half of the time apply until the next word of the same type, so the last value of
    each is carried from one part to the next.
    """

    word: np.dtype[Any] = np.dtype("<u2")

    def __init__(self) -> None:
        self._high: int | None = None  # upper half of the time, unwrapped past 2 ** 12
        self._low = 0
        self._y: int | None = None
        self._base, self._base_p = 0, 0

    def decode(self, words: NDArray[Any]) -> Events:
        loops = compiled_loops()
        return self._decode(words) if loops is None else self._decode_compiled(loops, words)

    def _decode_compiled(self, loops: ModuleType, words: NDArray[Any]) -> Events:
        events = Events.empty(loops.evt3_events(words))
        high, y = (-1 if each is None else each for each in (self._high, self._y))
        state = np.array([high, self._low, y, self._base, self._base_p])
        count = loops.decode_evt3(words, state, events.x, events.y, events.p, events.t)
        high, self._low, y, self._base, self._base_p = state.tolist()
        self._high, self._y = (None if each < 0 else each for each in (high, y))
        return events[:count]

    def _decode(self, words: NDArray[Any]) -> Events:
        kind, value = words >> 12, (words & 0xFFF).astype(np.int64)
        t = self._times(kind, value)
        y = _forward_fill(kind == _Y, value & 0x7FF, -1 if self._y is None else self._y)
        x, base_p = self._bases(kind, value)
        self._y = int(y[-1]) if y[-1] >= 0 else None
        single = kind == _X
        x[single] = value[single] & 0x7FF
        p = np.where(single, value >> 11, base_p)
        # Bit mask of the events of each word; a single event is a vector of length one.
        valid = np.where(single, 1, np.where(kind == _VECTOR_12, value, np.where(kind == _VECTOR_8, value & 0xFF, 0)))
        rows = np.flatnonzero((valid > 0) & (t >= 0) & (y >= 0))  # events before the first time or row are skipped
        mask = valid[rows]
        counts = _COUNT[mask]
        before = np.cumsum(counts) - counts  # events of the words before
        offset = _OFFSETS[np.arange(counts.sum()) + np.repeat(_FIRST[mask] - before, counts)]
        rows = np.repeat(rows, counts)
        return Events.of(x[rows] + offset, y[rows], p[rows], t[rows])

    def _times(self, kind: NDArray[Any], value: NDArray[np.int64]) -> NDArray[np.int64]:
        """Time in microseconds that applies at each word; negative before the first time word."""
        is_high = kind == _TIME_HIGH
        highs = unwrap_counter(value[is_high], 1 << 12, self._high)
        before = -1 if self._high is None else self._high
        known = np.concatenate(([before], highs))
        high = known[np.cumsum(is_high)]
        # When the upper half increases, the lower half is zero until its next word.
        increased = np.zeros(len(kind), np.bool_)
        increased[np.flatnonzero(is_high)[np.diff(known) != 0]] = True
        low = _forward_fill((kind == _TIME_LOW) | increased, np.where(increased, 0, value), self._low)
        self._low = int(low[-1])
        self._high = int(high[-1]) if high[-1] >= 0 else None
        return np.where(high < 0, -1, high << 12 | low)

    def _bases(self, kind: NDArray[Any], value: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Base x and polarity that apply at each word; every vector advances the base by its length."""
        is_base = kind == _VECTOR_BASE
        length = np.where(kind == _VECTOR_12, 12, np.where(kind == _VECTOR_8, 8, 0))
        advanced = np.cumsum(length) - length  # by the vectors before this word
        start = _forward_fill(is_base, (value & 0x7FF) - advanced, self._base)
        polarity = _forward_fill(is_base, value >> 11, self._base_p)
        x = start + advanced
        self._base, self._base_p = int(x[-1] + length[-1]), int(polarity[-1])
        return x, polarity


def _forward_fill(given: NDArray[np.bool_], values: NDArray[np.int64], before: int) -> NDArray[np.int64]:
    """At each position the last given value; `before` up to the first one."""
    known = np.concatenate(([before], values[given]))
    result: NDArray[np.int64] = known[np.cumsum(given)]
    return result
