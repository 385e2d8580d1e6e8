"""What an event file holds: sensor, number, rate, duration and bad events, in one pass with constant memory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stepcell.errors import InputError
from stepcell.runtime.media.events.bad_events import BadEvents
from stepcell.runtime.media.events.formats import open_events
from stepcell.runtime.media.events.reader import LARGEST, before_impossible, require_size

__all__ = ["EventSummary", "summarise_events"]


class EventSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An event file.

    Attributes:
        file: its path.
        format: such as "RAW, EVT 3.0".
        stream: which of several streams of events it is about, as the caller chose.
        width, height: of the sensor in pixels; None: neither the file nor the caller says.
        events: number of events, bad ones included.
        rising: those of pixels that became brighter.
        largest_x, largest_y: without bad events.
        start_us, end_us: first and last time in microseconds, without bad events: one may be years away.
        seconds: from one to the other.
        events_per_second: mean over that time, without bad events; None: it is zero.
        bad_events: by kind, as `run --on-bad-event drop` counts them; without a size none is outside.
        broken: what ended the file too early; None: it is whole.
    """

    file: str
    format: str
    stream: str | None
    width: int | None
    height: int | None
    events: int
    rising: int
    largest_x: int
    largest_y: int
    start_us: int
    end_us: int
    seconds: float
    events_per_second: float | None
    bad_events: dict[str, int]
    broken: str | None


def summarise_events(path: Path, size: tuple[int, int] | None = None, stream: str | None = None) -> EventSummary:
    """Read an event file from beginning to end.

    Args:
        path: an event file, as of `open_events`.
        size: (width, height) of the sensor in pixels, if the file does not say.
        stream: which of several streams of events of the file.

    Raises:
        InputError: the file cannot be opened, holds no event, or its sensor has another size.
        UsageError: several streams of events and none chosen.
        MissingDependencyError: the package that reads this format is not installed.
    """
    reader = open_events(path, stream)
    try:
        found = require_size(reader, size) if reader.size or size else None
        width, height = found or (LARGEST, LARGEST)
        bad = BadEvents(reader.name, (width, height), "drop")
        count = rising = 0
        largest = [0, 0]
        start: int | None = None
        end = 0
        broken = None
        try:
            for read in reader:
                part, wrong = before_impossible(reader.name, read, count)
                if len(part):
                    kept, _ = bad.mend(part)
                    count, rising = count + len(part), rising + int(part.p.sum())
                    if len(kept):
                        largest = [max(largest[0], int(kept.x.max())), max(largest[1], int(kept.y.max()))]
                        start, end = int(kept.t[0]) if start is None else start, int(kept.t[-1])
                if wrong is not None:
                    raise wrong
        except InputError as error:
            broken = error.message
        if not count:
            raise InputError(broken or f"{path}: contains no event")
        if start is None:
            raise InputError(f"{path}: all of its {count:,} events are outside a sensor of {width}x{height}")
    finally:
        reader.close()
    seconds = (end - start) / 1e6
    return EventSummary(
        file=str(path),
        format=reader.format,
        stream=stream,
        width=found[0] if found else None,
        height=found[1] if found else None,
        events=count,
        rising=rising,
        largest_x=largest[0],
        largest_y=largest[1],
        start_us=start,
        end_us=end,
        seconds=seconds,
        events_per_second=(count - sum(bad.counts.values())) / seconds if seconds else None,
        bad_events={str(kind): number for kind, number in bad.counts.items()},
        broken=broken,
    )
