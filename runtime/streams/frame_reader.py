"""Frame reader: decodes ahead in a background thread into a bounded queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.bad_events import BadEventError
from stepcell.runtime.media.source import BadEventCounts, Source
from stepcell.runtime.streams.reconnect import Reconnect

__all__ = ["DEPTH", "Frame", "FrameReader"]

logger = logging.getLogger(__name__)

DEPTH = 4  # length of the queue: evens out frames that are slow to decode, without adding lasting latency
JOIN_SECONDS = 1.0  # time allowed for closing the source: a blocking read of a device cannot be interrupted


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        array: as the source returned it.
        seconds: timestamp on the clock of the source, which is continued over reconnections; None: not known.
        arrived: time at which it was decoded, by `time.monotonic`.
        decode_seconds: time that decoding took.
        connection: number of reconnections before this frame.
        number: frames of the source before this one, dropped ones too.
    """

    array: NDArray[Any]
    seconds: float | None
    arrived: float
    decode_seconds: float
    connection: int
    number: int = 0


class FrameReader:
    """Reads one source until it ends, fails or is stopped, then closes it.

    Args:
        source: to read, starting at once. None: it could not be opened yet, and `reconnect` keeps trying.
        changed: notified when a frame arrives or the source ends; may be shared by several readers.
        name: name of the source, for messages.
        drop_oldest: when the queue is full, drop its oldest frame and count it, instead of blocking the source.
        depth: length of the queue.
        reconnect: how the source is reopened when it ends or fails; None: the reader ends with it.

    Attributes:
        name: name of the source.
        dropped: frames dropped because the queue was full.
        reconnects: number of times the source was lost and reopened.
    """

    def __init__(
        self,
        source: Source | None,
        changed: threading.Condition,
        *,
        name: str | None = None,
        drop_oldest: bool = False,
        depth: int = DEPTH,
        reconnect: Reconnect | None = None,
    ) -> None:
        self.name: str = name or (source.name if source else "source")
        self.dropped: int = 0
        self.reconnects: int = 0
        self._source, self._changed, self._reconnect = source, changed, reconnect
        self._drop_oldest, self._depth = drop_oldest, depth
        self._bad_events: BadEventCounts = {}  # of the connections before
        self._queue: deque[Frame] = deque()
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._done = False
        self._join_until = 0.0
        self._last: tuple[float, float | None] = (time.monotonic(), None)  # arrival and timestamp of the last frame
        self._offset = 0.0  # of the continued clock to that of the source, in seconds
        self._read_frames = 0
        self._attempts = 0  # to reopen the source, since the last frame
        self._thread = threading.Thread(target=self._run, name=f"read {self.name}", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Frames in the queue."""
        return len(self._queue)

    @property
    def bad_events(self) -> BadEventCounts:
        """Bad events of the source, by kind, over reconnections."""
        with self._changed:
            found = dict(self._bad_events)
            for kind, count in getattr(self._source, "bad_events", {}).items():
                found[kind] = found.get(kind, 0) + count
            return found

    @property
    def ended(self) -> bool:
        """Whether the queue is empty and stays so; `take` then raises the error that ended the source, if any."""
        with self._changed:
            return self._done and not self._queue

    def take(self) -> Frame | None:
        """Remove and return the next frame; None: the queue is empty.

        Raises:
            InputError: the source failed after the last frame. Other errors of the source are raised as they are.
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
        """Stop reading; the source is closed after the frame being read. Returns at once."""
        self._join_until = time.monotonic() + JOIN_SECONDS
        self._stopping.set()
        with self._changed:
            getattr(self._source, "interrupt", lambda: None)()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the source is closed, at most `JOIN_SECONDS` after `stop`; a blocked thread is abandoned."""
        self._thread.join(max(0.0, self._join_until - time.monotonic()))

    def _run(self) -> None:
        source = self._source
        error: BaseException | None = None
        try:
            while not self._stopping.is_set():
                broke = None if source is None else self._read(source)
                if self._reconnect is None or self._stopping.is_set():
                    break
                if source is not None:
                    if not self._attempts:  # logged once per loss, even if reopened sources give no frame
                        reason = broke.message if broke else "the stream ended"
                        logger.warning(f"{self.name}: lost ({reason}); reconnecting")
                    source.close()
                    with self._changed:
                        self._bad_events, self._source = self.bad_events, None
                source = self._source = self._reopen(self._reconnect, broke)
        except BaseException as broken:  # raised by `take` in the calling thread
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
        """Queue the frames until the source ends; returns the error if it failed and may be reopened."""
        started = time.monotonic()
        try:
            for array in source:
                self._put(array, source.seconds, time.monotonic() - started)
                if self._stopping.is_set():
                    break
                started = time.monotonic()
        except InputError as error:
            if self._reconnect is None or isinstance(error, BadEventError):
                raise
            return error
        return None

    def _put(self, array: NDArray[Any], seconds: float | None, decode_seconds: float) -> None:
        arrived = time.monotonic()
        last_arrived, last_seconds = self._last
        if self._attempts:
            self._attempts = 0
            self.reconnects += 1
            logger.info(f"{self.name}: reconnected after {arrived - last_arrived:.1f} s")
            if seconds is not None and last_seconds is not None:
                self._offset = last_seconds + arrived - last_arrived - seconds
        if seconds is not None:
            seconds += self._offset
        self._last = (arrived, seconds)
        with self._changed:
            while len(self._queue) >= self._depth and not self._stopping.is_set():
                if self._drop_oldest:
                    self._queue.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            self._queue.append(Frame(array, seconds, arrived, decode_seconds, self.reconnects, self._read_frames))
            self._read_frames += 1
            self._changed.notify_all()

    def _reopen(self, reconnect: Reconnect, error: InputError | None) -> Source | None:
        """Open the source again; None: the reader was stopped meanwhile.

        Raises:
            InputError: the last frame is more than `reconnect.timeout` ago.
        """
        while True:
            lost = time.monotonic() - self._last[0]
            if lost > reconnect.timeout:
                reason = f" ({error.message})" if error else ""
                raise InputError(f"{self.name}: lost and not reconnected within {reconnect.timeout:g} s{reason}")
            delay = reconnect.delay(self._attempts)
            self._attempts += 1
            if self._stopping.wait(min(delay, max(0.0, reconnect.timeout - lost) + 0.01)):
                return None
            try:
                return reconnect.open()
            except InputError as refused:
                error = refused
