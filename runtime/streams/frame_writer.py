"""Frame writer: converts and encodes in a background thread from a bounded queue."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import StepcellError
from stepcell.library_errors import as_stepcell_error
from stepcell.runtime.loop.latency import Latency, Stopwatch
from stepcell.runtime.media.sink import Sink, TimedSink
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["DEPTH", "FrameWriter"]

DEPTH = 4  # length of the queue
_POLL_SECONDS = 0.1  # interval at which `join` looks for an abort


class FrameWriter:
    """Writes to one sink until it is finished, abandoned or fails, then closes it.

    Args:
        sink: written and closed by the background thread only.
        changed: notified when the queue has room again or writing failed; may be shared by several writers.
        convert: makes a frame as the sink takes it of what `put` is given; called by the background thread.
        depth: length of the queue.

    Attributes:
        encode: time per frame in `Sink.write`; to be read after `join`.
        unwritten: frames that were put and are not written yet; 0 after a failure.
        closed: time at which the sink was closed, by `time.perf_counter`; None: not yet.
        written: frames in the output.
    """

    def __init__(
        self,
        sink: Sink,
        changed: threading.Condition,
        *,
        convert: Callable[[Any], NDArray[Any]] = lambda frame: frame,
        depth: int = DEPTH,
    ) -> None:
        self.sink: Sink = sink
        self.encode: Latency = Latency()
        self.closed: float | None = None
        self.written: int = 0
        self.unwritten: int = 0
        self._changed, self._convert, self._depth = changed, convert, depth
        self._queue: deque[tuple[Any, float]] = deque()
        self._keep: bool | None = None  # set by `finish` and `abandon`, which end the thread
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"write {sink.name}", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Frames in the queue."""
        return len(self._queue)

    @property
    def failed(self) -> bool:
        """Whether writing failed, so that `check`, `put` and `join` raise."""
        return self._error is not None

    @property
    def room(self) -> int:
        """How many frames `put` takes without waiting; all of the queue after a failure, which empties it."""
        return self._depth - len(self._queue)

    @property
    def has_room(self) -> bool:
        """Whether `put` returns or raises without waiting."""
        return self.room > 0

    def put(self, frame: Any, seconds: float = 0.0) -> None:
        """Queue a frame, waiting for room; the caller must not change its arrays afterwards.

        Args:
            frame: as `convert` takes it, without it as the sink does.
            seconds: its timestamp, for a sink that keeps it.

        Raises:
            OutputError: an earlier frame could not be written.
        """
        with self._changed:
            while not self.has_room:
                self._changed.wait()
            self.check()
            self._queue.append((frame, seconds))
            self.unwritten += 1
            self._changed.notify_all()

    @property
    def whole(self) -> int:
        """Frames that the output holds whatever happens to the process."""
        if self.closed is not None:
            return self.written
        return 0 if self.failed else getattr(self.sink, "whole", self.written)

    def drain(self, control: RunControl) -> None:
        """Wait until every frame in the queue is written, writing failed, or a stop is requested."""
        with self._changed:
            while self.unwritten and not control.stopping:
                self._changed.wait(_POLL_SECONDS)

    def check(self) -> None:
        """Raise the error with which writing failed, if it did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Write the queued frames, then close the sink. Returns at once."""
        self._end(keep=True)

    def abandon(self) -> None:
        """Discard the queued frames and the output. Returns at once."""
        self._end(keep=False)

    def join(self, control: RunControl | None = None) -> None:
        """Wait until the sink is closed, or the run is aborted by `control`.

        Raises:
            OutputError: a frame could not be written, or the sink not closed; the output has what was salvaged.
        """
        while self._thread.is_alive() and not (control is not None and control.aborting):
            self._thread.join(_POLL_SECONDS)
        self.check()

    def _end(self, *, keep: bool) -> None:
        with self._changed:
            if not keep:
                self._queue.clear()
            self._keep = keep
            self._changed.notify_all()

    def _run(self) -> None:
        sink = self.sink
        write = sink.write_at if isinstance(sink, TimedSink) else lambda frame, _: sink.write(frame)
        try:
            while (queued := self._next()) is not None:
                frame, seconds = self._convert(queued[0]), queued[1]
                with Stopwatch(self.encode):
                    write(frame, seconds)
                with self._changed:
                    self.written += 1
                    self.unwritten -= 1
                    self._changed.notify_all()
            if self._keep:
                self.sink.close()
            else:
                self.written = 0
                self.sink.abandon()
        except BaseException as error:  # raised by the next call, in the calling thread
            self.written = 0
            self._error = as_stepcell_error(error, self.sink.name) if isinstance(error, MemoryError) else error
            with self._changed:
                self.unwritten = 0
                self._queue.clear()
                self._changed.notify_all()
            with contextlib.suppress(OSError, StepcellError):  # the first error is the one to report
                self.written = self.sink.salvage()
        self.closed = time.perf_counter()

    def _next(self) -> tuple[Any, float] | None:
        """Wait for the next frame; None: the queue is empty and `finish` or `abandon` was called."""
        with self._changed:
            while not self._queue and self._keep is None:
                self._changed.wait()
            if not self._queue:
                return None
            frame = self._queue.popleft()
            self._changed.notify_all()
            return frame
