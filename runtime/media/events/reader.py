"""EventReader: the protocol of event files, and the checks that apply to every format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, UsageError
from stepcell.runtime.media.events.bad_events import BadEvents
from stepcell.runtime.media.events.columns import Events

__all__ = ["CHUNK", "LARGEST", "EventReader", "before_impossible", "require_size", "unwrap_counter", "validated"]

LARGEST = 1 << 14  # pixels along a side of the sensor: the limit of DAT, and more than any sensor has
LATEST = 4 * 10**15  # microseconds before or after 0, 127 years: times a number of bins they are int64
CHUNK = 1 << 16  # records read at a time, so that memory does not grow with the file


class EventReader(Protocol):
    """An event file of one format, iterated once in parts of up to `CHUNK` records.

    A reader is made with the path, for messages, and the open file, which it closes. A part may be empty, and where the
    format can hold pixels beyond uint16 or below zero, x and y have a wider dtype: `validated` looks at both. If a part
    cannot be read to its end, the events before that place are returned before the error is raised.

    Attributes:
        name: name of the file.
        format: the format, for people.
        size: (width, height) of the sensor in pixels; None: the file does not say.
    """

    name: str
    format: str
    size: tuple[int, int] | None

    def __iter__(self) -> Iterator[Events]: ...

    def close(self) -> None: ...


def require_size(reader: EventReader, size: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) of the sensor in pixels, of the file or else `size`.

    Raises:
        UsageError: neither says it.
        InputError: they differ, or it is no size of a sensor.
    """
    own = reader.size
    if own is not None and size is not None and own != size:
        raise InputError(f"{reader.name}: its sensor is {own[0]}x{own[1]}, --size says {size[0]}x{size[1]}")
    found = own or size
    if found is None or 0 in found:
        raise UsageError(f"{reader.name}: does not state the size of its sensor", hint="add --size WIDTHxHEIGHT")
    if max(found) > LARGEST:
        raise InputError(
            f"{reader.name}: expected a sensor of at most {LARGEST} pixels a side, got {found[0]}x{found[1]}"
        )
    return found


def validated(reader: EventReader, bad: BadEvents) -> Iterator[Events]:
    """The parts of a file, each checked; a part may be empty.

    Args:
        reader: reader of the file.
        bad: what to do with bad events; it counts them.

    Raises:
        InputError: the file contains no event, or a bad one, or a time that no camera has; the events before it were
            returned.
    """
    number = 0
    for part in reader:
        part, wrong = before_impossible(reader.name, part, number)
        events, error = bad.mend(part)
        yield events
        if (ended := error or wrong) is not None:
            raise ended
        number += len(part)
    if not number:
        raise InputError(f"{reader.name}: contains no event")


def before_impossible(name: str, part: Events, number: int) -> tuple[Events, InputError | None]:
    """The events of a part before the first time that no camera has, and the error that says so.

    Args:
        name: name of the file.
        part: events.
        number: number of its first event.
    """
    possible = (part.t >= -LATEST) & (part.t <= LATEST)
    if possible.all():
        return part, None
    row = int(possible.argmin())
    return part[:row], InputError(
        f"{name}: event {number + row}: expected a time within {LATEST:,} us of 0, got {part.t[row]:,}",
        hint="times are microseconds, or seconds with a decimal point; nanoseconds are not read",
    )


def unwrap_counter(values: NDArray[np.int64], period: int, last: int | None) -> NDArray[np.int64]:
    """A counter that wraps to zero after `period`, as one that does not wrap.

    Args:
        values: 0 to period - 1.
        period: number of values of the counter.
        last: the last value that the previous call returned for this counter; None for the first call.
    """
    if not len(values):
        return values
    jumps = np.diff(values, prepend=values[0] if last is None else last % period)
    wraps = np.cumsum(jumps < -period // 2)  # a smaller decrease is an error of the file, not a wrap
    result: NDArray[np.int64] = values + period * (wraps + (0 if last is None else last // period))
    return result
