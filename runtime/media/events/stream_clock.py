"""StreamClock: the time of a live camera while it sends nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from stepcell.runtime.media.events.columns import Events

__all__ = ["StreamClock"]

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 0.2  # without an event, until windows come by the clock; also how far they stay behind it
_DRIFT_SECONDS = 1.0  # between the times of events and the clock: with more, they are not those of now
_COMPARED_SECONDS = 60.0  # over which they are compared: clocks of cameras are wrong by a second in some hours


class StreamClock:
    """Continues the times of events by the clock of this machine.

    Only for events that come as they happen. If their times drift from the clock, as those of a recording that is sent
    as fast as it can be read, nothing is known about silence.

    Args:
        name: of the stream, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: tuple[int, float] | None = None  # time of an earlier event, and when it came
        self._last = (0, 0.0)
        self._told = False

    def watch(self, parts: Iterable[Events]) -> Iterator[Events]:
        """The parts, as they come; an empty one says that none came."""
        for part in parts:
            if len(part):
                arrived = time.monotonic()
                self._first = self._first or (int(part.t[0]), arrived)
                self._last = (int(part.t[-1]), arrived)
                if arrived - self._first[1] > _COMPARED_SECONDS and abs(self._drift()) <= _DRIFT_SECONDS:
                    self._first = self._last
            yield part

    def now(self) -> int | None:
        """Time in microseconds before which no event is awaited any more; None: not known, or there is no silence."""
        if self._first is None:
            return None
        silent = time.monotonic() - self._last[1]
        if silent < SILENCE_SECONDS or self._drifts():
            return None
        return self._last[0] + int((silent - SILENCE_SECONDS) * 1e6)

    def _drift(self) -> float:
        """Seconds that the last event is ahead of the clock."""
        assert self._first is not None
        return (self._last[0] - self._first[0]) / 1e6 - (self._last[1] - self._first[1])

    def _drifts(self) -> bool:
        drift = self._drift()
        if abs(drift) <= _DRIFT_SECONDS:
            return False
        if not self._told:
            how = f"{abs(drift):.1f} s {'ahead of' if drift > 0 else 'behind'} the clock"
            logger.info(f"{self._name}: its events are {how}, so that windows come with events only")
            self._told = True
        return True
