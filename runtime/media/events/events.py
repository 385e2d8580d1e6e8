"""Events as columns, and what every file of them has to keep to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError

__all__ = ["CHUNK", "LARGEST", "EventReader", "Events", "checked", "unwrap"]

LARGEST = 1 << 14  # pixels along a side: what DAT can hold, and more than any sensor has
CHUNK = 1 << 20  # records that are read at once: memory does not grow with the file


@dataclass(frozen=True)
class Events:
    """Events in order of time.

    Attributes:
        x, y: pixel, (n,) uint16, from the upper left corner.
        p: (n,) bool: True where it became brighter.
        t: (n,) int64, microseconds.
    """

    x: NDArray[np.uint16]
    y: NDArray[np.uint16]
    p: NDArray[np.bool_]
    t: NDArray[np.int64]

    @classmethod
    def of(cls, x: NDArray[Any], y: NDArray[Any], p: NDArray[Any], t: NDArray[Any]) -> Events:
        """From columns of any integers."""
        return cls(x.astype(np.uint16), y.astype(np.uint16), p.astype(np.bool_), t.astype(np.int64))

    @classmethod
    def join(cls, parts: Sequence[Events]) -> Events:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        empty = np.empty(0, np.int64)
        parts = parts or [cls.of(empty, empty, empty, empty)]
        x, y, p, t = (np.concatenate([getattr(part, name) for part in parts]) for name in "xypt")
        return cls(x, y, p, t)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: slice) -> Events:
        return Events(self.x[rows], self.y[rows], self.p[rows], self.t[rows])


class EventReader(Protocol):
    """A file of events.

    Attributes:
        name: of the file.
        size: width and height of the sensor, where the file says.
    """

    name: str
    size: tuple[int, int] | None

    def __iter__(self) -> Iterator[Events]: ...

    def close(self) -> None: ...


def checked(reader: EventReader, size: tuple[int, int]) -> Iterator[Events]:
    """The parts of a file, each looked at.

    Raises:
        InputError: there is no event, a time goes back, or a pixel lies outside the sensor.
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
        raise InputError(f"{reader.name}: holds no event")


def _require_order(name: str, t: NDArray[np.int64], number: int, last: int | None) -> None:
    steps = np.diff(t, prepend=t[0] if last is None else last)
    if (steps < 0).any():
        row = int((steps < 0).argmax())
        raise InputError(
            f"{name}: event {number + row} is {-int(steps[row])} us earlier than the one before it",
            hint="events have to be in order of time: sort them, or the file is broken",
        )


def unwrap(values: NDArray[np.int64], period: int, last: int | None) -> NDArray[np.int64]:
    """A counter that starts again at zero after `period`, as one that goes on.

    Args:
        values: 0 to period - 1.
        last: what this function returned last for the counter; None at its start.
    """
    if not len(values):
        return values
    jumps = np.diff(values, prepend=values[0] if last is None else last % period)
    turns = np.cumsum(jumps < -period // 2)  # a smaller step back is a fault of the file, not a new turn
    result: NDArray[np.int64] = values + period * (turns + (0 if last is None else last // period))
    return result
