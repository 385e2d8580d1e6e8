"""EventReader: the protocol of event files, and the checks that apply to every format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.columns import Events

__all__ = ["CHUNK", "LARGEST", "EventReader", "unwrap_counter", "validated"]

LARGEST = 1 << 14  # pixels along a side of the sensor: the limit of DAT, and more than any sensor has
CHUNK = 1 << 20  # records read at a time, so that memory does not grow with the file


class EventReader(Protocol):
    """An event file of one format, iterated once in parts of up to `CHUNK` records.

    A reader is made with the path, for messages, and the open file, which it closes.

    Attributes:
        name: name of the file.
        size: (width, height) of the sensor in pixels; None: the file does not say.
    """

    name: str
    size: tuple[int, int] | None

    def __iter__(self) -> Iterator[Events]: ...

    def close(self) -> None: ...


def validated(reader: EventReader, size: tuple[int, int]) -> Iterator[Events]:
    """The non-empty parts of a file, each checked.

    Args:
        reader: reader of the file.
        size: (width, height) of the sensor in pixels.

    Raises:
        InputError: the file contains no event, a timestamp decreases, or a pixel lies outside the sensor.
    """
    number, last = 0, None
    for events in reader:
        if not len(events):
            continue
        _require_order(reader.name, events.t, number, last)
        outside = (events.x >= size[0]) | (events.y >= size[1])
        if outside.any():
            row = int(outside.argmax())
            raise InputError(
                f"{reader.name}: event {number + row} is at ({events.x[row]}, {events.y[row]}), "
                f"outside the sensor of {size[0]}x{size[1]}",
                hint="the file is broken, or the size is that of another camera",
            )
        yield events
        number, last = number + len(events), int(events.t[-1])
    if number == 0:
        raise InputError(f"{reader.name}: contains no event")


def _require_order(name: str, t: NDArray[np.int64], number: int, last: int | None) -> None:
    steps = np.diff(t, prepend=t[0] if last is None else last)
    if (steps < 0).any():
        row = int((steps < 0).argmax())
        raise InputError(
            f"{name}: event {number + row} is {-int(steps[row])} us earlier than the one before it",
            hint="events must be sorted by time; otherwise the file is broken",
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
