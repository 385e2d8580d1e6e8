"""EVT 2.0 decoder: 32-bit words, each an event or the upper 28 bits of the time.

https://docs.prophesee.ai/stable/data/encoding_formats/evt2.html
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.compiled import compiled_loops
from stepcell.runtime.media.events.reader import unwrap_counter

__all__ = ["Evt2"]

_TIME_HIGH = 8  # type of a word, its upper four bits; 0 and 1 are events of that polarity


class Evt2:
    """Decodes a stream part by part; other words, such as triggers, are skipped."""

    word: np.dtype[Any] = np.dtype("<u4")

    def __init__(self) -> None:
        self._high: int | None = None  # upper part of the time, unwrapped past 2 ** 28

    def decode(self, words: NDArray[Any]) -> Events:
        loops = compiled_loops()
        return self._decode(words) if loops is None else self._decode_compiled(loops, words)

    def _decode_compiled(self, loops: ModuleType, words: NDArray[Any]) -> Events:
        events = Events.empty(int(np.count_nonzero(words < 2 << 28)))
        state = np.array([-1 if self._high is None else self._high])
        count = loops.decode_evt2(words, state, events.x, events.y, events.p, events.t)
        self._high = int(state[0]) if state[0] >= 0 else None
        return events[:count]

    def _decode(self, words: NDArray[Any]) -> Events:
        kind = words >> 28
        is_high = kind == _TIME_HIGH
        seen = np.cumsum(is_high)  # index of the time word that applies to each word
        high = unwrap_counter((words[is_high] & 0xFFFFFFF).astype(np.int64), 1 << 28, self._high)
        known = np.concatenate(([-1 if self._high is None else self._high], high))
        rows = np.flatnonzero((kind <= 1) & (known[seen] >= 0))  # events before the first time word are skipped
        if len(high):
            self._high = int(high[-1])
        word = words[rows]
        t = known[seen[rows]] << 6 | (word >> 22 & 0x3F)
        return Events.of(word >> 11 & 0x7FF, word & 0x7FF, word >> 28, t)
