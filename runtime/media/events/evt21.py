"""EVT 2.1 decoder: 64-bit words, each up to 32 events of a row or the upper 28 bits of the time.

The upper half of a word is laid out as in EVT 2.0, with the x of the first pixel; the lower half has a bit for each of
the 32 pixels from there on. GenX320 sends a word as one little-endian number; older ones, IMX636 among them, send the
upper half first, each half little-endian, which the header calls legacy.
https://docs.prophesee.ai/stable/data/encoding_formats/evt21.html
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.compiled import compiled_loops
from stepcell.runtime.media.events.reader import unwrap_counter

__all__ = ["Evt21"]

_TIME_HIGH = 8  # type of a word, its upper four bits; 0 and 1 are events of that polarity
_AT_ONCE = 1 << 17  # words that are unpacked together: 32 bytes each


class Evt21:
    """Decodes a stream part by part; other words, such as triggers, are skipped.

    Args:
        legacy: the upper half of a word comes first.
    """

    def __init__(self, *, legacy: bool) -> None:
        halves = [("head", "<u4"), ("valid", "<u4")] if legacy else [("valid", "<u4"), ("head", "<u4")]
        self.word: np.dtype[Any] = np.dtype(halves)
        self._high: int | None = None  # upper part of the time, unwrapped past 2 ** 28

    def decode(self, words: NDArray[Any]) -> Events:
        loops = compiled_loops()
        if loops is not None:
            return self._decode_compiled(loops, words)
        return Events.join([self._decode(words[at : at + _AT_ONCE]) for at in range(0, len(words), _AT_ONCE)])

    def _decode_compiled(self, loops: ModuleType, words: NDArray[Any]) -> Events:
        halves = [np.ascontiguousarray(words[name]) for name in ("head", "valid")]
        events = Events.empty(loops.evt21_events(*halves))
        state = np.array([-1 if self._high is None else self._high])
        count = loops.decode_evt21(*halves, state, events.x, events.y, events.p, events.t)
        self._high = int(state[0]) if state[0] >= 0 else None
        return events[:count]

    def _decode(self, words: NDArray[Any]) -> Events:
        head = words["head"]
        kind = head >> 28
        is_high = kind == _TIME_HIGH
        seen = np.cumsum(is_high)  # index of the time word that applies to each word
        high = unwrap_counter((head[is_high] & 0xFFFFFFF).astype(np.int64), 1 << 28, self._high)
        known = np.concatenate(([-1 if self._high is None else self._high], high))
        rows = np.flatnonzero((kind <= 1) & (known[seen] >= 0))  # events before the first time word are skipped
        if len(high):
            self._high = int(high[-1])
        head = head[rows]
        bits = np.unpackbits(words["valid"][rows].astype("<u4").view(np.uint8), bitorder="little")
        place = np.flatnonzero(bits)
        word, offset = place >> 5, place & 31
        t = known[seen[rows]] << 6 | (head >> 22 & 0x3F)
        return Events.of((head >> 11 & 0x7FF)[word] + offset, (head & 0x7FF)[word], (head >> 28)[word], t[word])
