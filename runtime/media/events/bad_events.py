"""Bad events: those outside the sensor and those earlier than the event before; counted, and stopped at or mended."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.source import BadEvent, BadEventCounts

__all__ = ["BadEventError", "BadEvents", "OnBadEvent"]

logger = logging.getLogger(__name__)

OnBadEvent = Literal["stop", "drop", "clamp"]

_NEVER = np.iinfo(np.int64).min
_HINT = (
    "--on-bad-event drop leaves such events out, clamp moves them onto the sensor and to the time of the event before; "
    "if there are many, the file is broken or the size is that of another camera"
)


class BadEventError(InputError):
    """A bad event ends the stream, which is not opened again."""


class BadEvents:
    """Looks at the events of one stream, part by part.

    An event that is both outside and early counts as outside.

    Args:
        name: name of the stream, for messages.
        size: (width, height) of the sensor in pixels.
        policy: "stop": the stream ends before the first bad event. "drop": bad events are left out; early is what is
            before the latest time of the events kept. "clamp": x and y move to the nearest pixel of the sensor, t to
            the latest time before.
        quiet: log nothing; the same events were told of before.

    Attributes:
        counts: bad events found, by kind; with "stop" one at most.
    """

    def __init__(self, name: str, size: tuple[int, int], policy: OnBadEvent = "stop", *, quiet: bool = False) -> None:
        self.counts: BadEventCounts = {"outside": 0, "back in time": 0}
        self._name, self._size, self._policy, self._quiet = name, size, policy, quiet
        self._number = 0  # events of the parts so far
        self._latest = _NEVER  # time of the last event kept

    def mend(self, events: Events) -> tuple[Events, InputError | None]:
        """The events of the next part that are kept, and the error that ends the stream after them.

        Args:
            events: x and y of any integer dtype; uint16 in the result.
        """
        if not len(events):
            return events, None
        kept, error = (events, None) if self._all_good(events) else self._mended(events)
        self._number += len(events)
        if len(kept):
            self._latest = int(kept.t[-1])
        return Events.of(kept.x, kept.y, kept.p, kept.t), error

    def _all_good(self, events: Events) -> bool:
        t = events.t
        return bool(t[0] >= self._latest and (t[1:] >= t[:-1]).all()) and all(
            column.max() < side and (column.dtype.kind == "u" or column.min() >= 0)
            for column, side in zip((events.x, events.y), self._size, strict=True)
        )

    def _mended(self, events: Events) -> tuple[Events, InputError | None]:
        width, height = self._size
        x, y, p, t = events.x, events.y, events.p, events.t
        outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
        counting = t if self._policy == "clamp" else np.where(outside, _NEVER, t)
        latest = np.maximum(np.maximum.accumulate(counting), self._latest)
        early = ~outside & (t < latest)
        bad = outside | early
        if self._policy == "stop":
            row = int(bad.argmax())
            self.counts["outside" if outside[row] else "back in time"] += 1
            return events[:row], BadEventError(self._describe(events, row, outside, latest), hint=_HINT)
        kinds: tuple[tuple[BadEvent, NDArray[np.bool_]], ...] = (("outside", outside), ("back in time", early))
        for kind, rows in kinds:
            if rows.any() and not self.counts[kind] and not self._quiet:
                done = "left out" if self._policy == "drop" else "clamped"
                text = self._describe(events, int(rows.argmax()), outside, latest)
                logger.warning(f"{text}: {done}, as are all of this kind")
            self.counts[kind] += int(rows.sum())
        if self._policy == "drop":
            return Events(x[~bad], y[~bad], p[~bad], t[~bad]), None
        return Events(x.clip(0, width - 1), y.clip(0, height - 1), p, latest), None

    def _describe(self, events: Events, row: int, outside: NDArray[np.bool_], latest: NDArray[np.int64]) -> str:
        where = f"event {self._number + row} at ({events.x[row]}, {events.y[row]}), {events.t[row]} us"
        wrong = f"outside the sensor of {self._size[0]}x{self._size[1]}"
        if not outside[row]:
            wrong = f"{latest[row] - events.t[row]} us earlier than the one before it"
        return f"{self._name}: {where}: {wrong}"
