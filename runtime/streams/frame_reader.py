"""A source read ahead in a thread of its own, into a bounded queue.

The step never waits for a decoder that could have been at work, and a stream that stands still
holds up no other. What is read ahead is bounded by frames, so a fast source takes no more memory
than a slow one.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.sources import Source

__all__ = ["DEPTH", "Feed", "Frame", "Reconnect"]

logger = logging.getLogger(__name__)

DEPTH = 4  # frames read ahead: hides a slow picture among fast ones, and adds no latency that lasts
LEAVE_SECONDS = 1.0  # a read that a device never answers cannot be broken off; the process ends without it


@dataclass(frozen=True)
class Frame:
    """One frame of a source, and when it came.

    Attributes:
        array: as the source gives it.
        seconds: when it was taken, on the source's own clock, which goes on over a reconnection.
        arrived: when it was read, by `time.monotonic`.
        reading: seconds that reading it took.
        connection: how often the source had been opened again before it; where this differs from the
            frame before, something was missed.
    """

    array: NDArray[Any]
    seconds: float | None
    arrived: float
    reading: float
    connection: int


@dataclass(frozen=True)
class Reconnect:
    """How a lost camera or URL is opened again.

    Between two attempts there are `first` seconds, then twice as many each time up to `most`;
    each wait is shortened by up to a half at random, so that ten boxes do not come back to one
    server at the same moment.

    Attributes:
        open: gives a fresh source, or raises InputError.
        patience: seconds after the last frame until the source is given up.
    """

    open: Callable[[], Source]
    patience: float
    first: float = 0.5
    most: float = 30.0

    def delay(self, attempt: int) -> float:
        """Seconds before attempt 0, 1, 2, ..."""
        whole = min(self.most, self.first * 2.0 ** min(attempt, 32))
        return whole * random.uniform(0.5, 1.0)


class Feed:
    """Reads one source until it ends, breaks or is stopped, and closes it.

    Args:
        source: its first frame is read at once. None: it could not be opened; `reconnect` tries.
        changed: notified when a frame came or the source ended; shared with whoever waits for several.
        drop: where the queue is full the oldest frame gives way, and is counted. Otherwise the
            source waits.
        reconnect: what to do when the source ends or breaks; None: the feed ends with it.

    Attributes:
        name: of the source.
        dropped: frames that gave way.
        reconnects: how often the source was lost and came back.
    """

    def __init__(
        self,
        source: Source | None,
        changed: threading.Condition,
        *,
        name: str | None = None,
        drop: bool = False,
        depth: int = DEPTH,
        reconnect: Reconnect | None = None,
    ) -> None:
        self.name = name or (source.name if source else "source")
        self.dropped = self.reconnects = 0
        self._source, self._changed, self._drop, self._reconnect = source, changed, drop, reconnect
        self._depth = depth
        self._queue: deque[Frame] = deque()
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._done = False
        self._left = 0.0  # when the wait for the source is over
        self._last: tuple[float, float | None] = (time.monotonic(), None)  # arrival and time of the last frame
        self._offset = 0.0  # from the source's clock to one that goes on
        self._attempts = 0  # since the last frame
        self._thread = threading.Thread(target=self._run, name=f"read {self.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Frames in the queue."""
        return len(self._queue)

    @property
    def ended(self) -> bool:
        """Whether no frame is left and none will come; `take` then raises what ended it, if anything did."""
        with self._changed:
            return self._done and not self._queue

    def take(self) -> Frame | None:
        """The next frame; None where there is none now.

        Raises:
            InputError: the source broke at this point; or whatever else it raised.
        """
        with self._changed:
            if self._queue:
                frame = self._queue.popleft()
                self._changed.notify_all()
                return frame
            error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def stop(self) -> None:
        """Read no further; the source is closed after the frame at hand."""
        self._left = time.monotonic() + LEAVE_SECONDS
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def wait(self) -> None:
        """After `stop`: until the source is closed; a read that hangs is left behind, many as soon as one."""
        self._thread.join(max(0.0, self._left - time.monotonic()))

    def _run(self) -> None:
        source = self._source
        error: BaseException | None = None
        try:
            while not self._stopping.is_set():
                broke = None if source is None else self._read(source)
                if self._reconnect is None or self._stopping.is_set():
                    break
                if source is not None:
                    if not self._attempts:  # said once, however often it comes and goes without a frame
                        logger.warning(
                            f"{self.name}: lost ({broke.message if broke else 'the stream ended'}); opening it again"
                        )
                    source.close()
                    source = None
                source = self._open(self._reconnect, broke)
        except BaseException as broken:  # `take` raises it again, in the thread that asks
            error = broken
        try:
            if source is not None:
                source.close()
        except BaseException as broken:
            error = error or broken
        with self._changed:
            self._done, self._error = True, error
            self._changed.notify_all()

    def _read(self, source: Source) -> InputError | None:
        """Queue its frames until it ends; what it broke with."""
        started = time.monotonic()
        try:
            for array in source:
                self._put(array, source.seconds, time.monotonic() - started)
                if self._stopping.is_set():
                    break
                started = time.monotonic()
        except InputError as error:
            if self._reconnect is None:
                raise
            return error
        return None

    def _put(self, array: NDArray[Any], seconds: float | None, reading: float) -> None:
        arrived = time.monotonic()
        last_arrived, last_seconds = self._last
        if self._attempts:
            self._attempts = 0
            self.reconnects += 1
            logger.info(f"{self.name}: back after {arrived - last_arrived:.1f} s")
            if seconds is not None and last_seconds is not None:
                self._offset = last_seconds + arrived - last_arrived - seconds
        if seconds is not None:
            seconds += self._offset
        self._last = (arrived, seconds)
        with self._changed:
            while len(self._queue) >= self._depth and not self._stopping.is_set():
                if self._drop:
                    self._queue.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            self._queue.append(Frame(array, seconds, arrived, reading, self.reconnects))
            self._changed.notify_all()

    def _open(self, reconnect: Reconnect, error: InputError | None) -> Source | None:
        """A fresh source; None where the feed was stopped meanwhile.

        Raises:
            InputError: the source has been lost for longer than `patience`.
        """
        while True:
            lost = time.monotonic() - self._last[0]
            if lost > reconnect.patience:
                reason = f" ({error.message})" if error else ""
                raise InputError(f"{self.name}: lost, and not back within {reconnect.patience:g} s{reason}")
            delay = reconnect.delay(self._attempts)
            self._attempts += 1
            if self._stopping.wait(min(delay, max(0.0, reconnect.patience - lost) + 0.01)):
                return None
            try:
                return reconnect.open()
            except InputError as refused:
                error = refused
