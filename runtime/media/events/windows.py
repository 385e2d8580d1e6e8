"""Event windows: splits a stream of events by time or by number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from stepcell.event_spec import EventWindow
from stepcell.limits import EMPTY_WINDOWS
from stepcell.runtime.media.events.columns import Events

__all__ = ["split_windows"]


def split_windows(
    parts: Iterable[Events], window: EventWindow, pixels: int, now: Callable[[], int | None] = lambda: None
) -> Iterator[tuple[Events, int]]:
    """The events of each window, and its end in microseconds.

    Windows by time follow each other without a gap from the first event on; a window may be empty, and the last one
    may be shorter. Windows by number omit the events at the end that fill no window.

    Args:
        parts: consecutive parts of a stream, in order of time, of any length.
        window: the size of a window.
        pixels: number of pixels of the sensor.
        now: asked at an empty part, which says that no event came meanwhile: windows by time that end before it are
            over. Events of such a window that come later count in the next one.

    Raises:
        InputError: a pause of more windows than the limit.
    """
    count = window.count(pixels)
    return _by_time(parts, round(window.size), now) if count is None else _by_count(parts, count)


def _by_count(parts: Iterable[Events], count: int) -> Iterator[tuple[Events, int]]:
    waiting: list[Events] = []
    for part in parts:
        waiting += [part] if len(part) else []
        if sum(map(len, waiting)) < count:
            continue
        events = Events.join(waiting)
        whole = len(events) // count * count
        for start in range(0, whole, count):
            yield events[start : start + count], int(events.t[start + count - 1])
        waiting = [events[whole:]]


def _by_time(parts: Iterable[Events], step: int, now: Callable[[], int | None]) -> Iterator[tuple[Events, int]]:
    waiting: list[Events] = []
    end: int | None = None
    for part in parts:
        if not len(part):
            time = now()
            while end is not None and time is not None and end <= time:
                yield Events.join(waiting), end
                waiting, end = [], end + step
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
            pause = int(events.t[stop]) - end
            EMPTY_WINDOWS.check(
                pause // step, "events", f"a pause of {pause} us in windows of {step} us, or times of another unit"
            )
            start, end = stop, end + step
        waiting = [events[start:]]
    if end is not None:
        yield Events.join(waiting), end
