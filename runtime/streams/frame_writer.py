"""A sink that writes in a thread of its own, from a bounded queue.

Encoding a picture can take as long as the step that made it; it is done while the next step runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import StepcellError
from stepcell.runtime.loop.latency import Latency, Stopwatch
from stepcell.runtime.media.sinks import Sink

__all__ = ["Writer"]

DEPTH = 4  # frames that wait to be written


class Writer:
    """Writes to one sink until it is finished, abandoned or fails, and closes it.

    Args:
        sink: written to and closed by this thread only.
        changed: notified when there is room again or the writing failed; shared with whoever
            waits for several.

    Attributes:
        encode: time per frame in `Sink.write`; to be read after `wait`.
        closed: when the sink was closed, by `time.perf_counter`.
        written: frames in what it was closed with.
    """

    def __init__(self, sink: Sink, changed: threading.Condition, *, depth: int = DEPTH) -> None:
        self.sink = sink
        self.encode = Latency()
        self.closed: float | None = None
        self.written = 0
        self._changed, self._depth = changed, depth
        self._queue: deque[NDArray[Any]] = deque()
        self._keep: bool | None = None  # once decided, the thread ends
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"write {sink.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Frames in the queue."""
        return len(self._queue)

    @property
    def failed(self) -> bool:
        """Whether writing failed, so that `check`, `put` and `wait` raise."""
        return self._error is not None

    @property
    def ready(self) -> bool:
        """Whether `put` would return at once, or raise: nothing is left in the queue of a writer that failed."""
        return len(self._queue) < self._depth

    def put(self, frame: NDArray[Any]) -> None:
        """Hand over a frame, which is the writer's from now on; waits for room.

        Raises:
            OutputError: an earlier frame could not be written.
        """
        with self._changed:
            while not self.ready:
                self._changed.wait()
            self.check()
            self._queue.append(frame)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what writing failed with, if it did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Write what is left and close the sink, in the writer's own time."""
        self._end(keep=True)

    def abandon(self) -> None:
        """Write nothing more and leave no file."""
        self._end(keep=False)

    def wait(self) -> None:
        """Until the sink is closed.

        Raises:
            OutputError: it could not be written or closed; it holds what could be salvaged then.
        """
        self._thread.join()
        self.check()

    def _end(self, *, keep: bool) -> None:
        with self._changed:
            if not keep:
                self._queue.clear()
            self._keep = keep
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (frame := self._next()) is not None:
                with Stopwatch(self.encode):
                    self.sink.write(frame)
                self.written += 1
            if self._keep:
                self.sink.close()
            else:
                self.written = 0
                self.sink.abandon()
        except BaseException as error:  # the thread that hands over frames raises it again, at once
            self.written, self._error = 0, error
            with self._changed:
                self._queue.clear()
                self._changed.notify_all()
            with contextlib.suppress(OSError, StepcellError):  # what broke first is what is raised
                self.written = self.sink.salvage()
        self.closed = time.perf_counter()

    def _next(self) -> NDArray[Any] | None:
        """The next frame; None once nothing is left and nothing will come."""
        with self._changed:
            while not self._queue and self._keep is None:
                self._changed.wait()
            if not self._queue:
                return None
            frame = self._queue.popleft()
            self._changed.notify_all()
            return frame
