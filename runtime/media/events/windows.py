"""A stream of events cut into the windows that are stepped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from stepcell.event_spec import EventWindow
from stepcell.runtime.media.events.events import Events

__all__ = ["windows"]


def windows(parts: Iterable[Events], window: EventWindow, pixels: int) -> Iterator[tuple[Events, int]]:
    """Each window's events, and its end in microseconds.

    By time, windows follow each other without a gap from the first event on; where nothing happened
    one is empty, and the last one ends with the events. By count, what is left at the end and fills
    no window is left out.

    Args:
        parts: of a stream, in order of time, of any length.
        pixels: of the sensor.
    """
    count = window.count(pixels)
    return _by_time(parts, round(window.size)) if count is None else _by_count(parts, count)


def _by_count(parts: Iterable[Events], count: int) -> Iterator[tuple[Events, int]]:
    waiting: list[Events] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) < count:
            continue
        events = Events.join(waiting)
        whole = len(events) // count * count
        for start in range(0, whole, count):
            yield events[start : start + count], int(events.t[start + count - 1])
        waiting = [events[whole:]]


def _by_time(parts: Iterable[Events], step: int) -> Iterator[tuple[Events, int]]:
    waiting: list[Events] = []
    end: int | None = None
    for part in parts:
        if not len(part):
            continue
        end = int(part.t[0]) + step if end is None else end
        waiting.append(part)
        if part.t[-1] < end:
            continue
        events = Events.join(waiting)
        start = 0
        while end <= events.t[-1]:
            stop = start + int(np.searchsorted(events.t[start:], end))
            yield events[start:stop], end
            start, end = stop, end + step
        waiting = [events[start:]]
    if end is not None:
        yield Events.join(waiting), end
