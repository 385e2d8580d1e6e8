"""CUDA streams, events and graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepcell.runtime.cuda.bindings import check, driver

__all__ = ["DEFAULT_STREAM", "Event", "Graph", "Stream", "wait_on"]

DEFAULT_STREAM = 1  # handle of the legacy default stream, CU_STREAM_LEGACY


class Stream:
    """A stream of the current device that does not synchronise with the default stream."""

    def __init__(self) -> None:
        module = driver()
        self.handle = int(check(module.cuStreamCreate(module.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def synchronize(self) -> None:
        """Wait until everything queued so far is done; errors of that work are raised here."""
        check(driver().cuStreamSynchronize(self.handle))

    def wait(self, event: Event) -> None:
        """Queue a wait: work queued after this starts once the event has completed."""
        wait_on(self.handle, event)

    def close(self) -> None:
        handle, self.handle = self.handle, 0
        if handle:
            check(driver().cuStreamDestroy(handle))


def wait_on(stream: int, event: Event) -> None:
    """`Stream.wait` for the CUDA handle of any stream."""
    check(driver().cuStreamWaitEvent(stream, event.handle, 0))


class Event:
    """A CUDA event, for waiting and for timing."""

    def __init__(self) -> None:
        module = driver()
        self.handle: Any = check(module.cuEventCreate(module.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, stream: Stream) -> None:
        self.record_on(stream.handle)

    def record_on(self, stream: int) -> None:
        """`record` for the CUDA handle of any stream."""
        check(driver().cuEventRecord(self.handle, stream))

    def synchronize(self) -> None:
        """Wait until the work before the event is done, and for nothing else; its errors are raised here."""
        check(driver().cuEventSynchronize(self.handle))

    def milliseconds_since(self, earlier: Event) -> float:
        """Time between two recorded events whose work is done."""
        return float(check(driver().cuEventElapsedTime(earlier.handle, self.handle)))

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            check(driver().cuEventDestroy(handle))


class Graph:
    """A CUDA graph: work captured once and launched as a whole, at the same addresses each time."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def capture(cls, stream: Stream, work: Callable[[], None]) -> Graph:
        """Capture what `work` queues on `stream`, without running it.

        Raises:
            DeviceError: the work cannot be captured, or CUDA refuses the graph. The stream can be used as before.
                Errors of `work` itself pass through.
        """
        module = driver()
        # Thread-local: calls of other threads that cannot be captured do not invalidate this capture.
        mode = module.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(module.cuStreamBeginCapture(stream.handle, mode))
        try:
            work()
        except Exception:
            status, graph = module.cuStreamEndCapture(stream.handle)  # frees the stream whatever the status is
            if not status:
                module.cuGraphDestroy(graph)
            raise
        graph = check(module.cuStreamEndCapture(stream.handle))
        try:
            return cls(check(module.cuGraphInstantiate(graph, 0)))
        finally:
            check(module.cuGraphDestroy(graph))

    def launch(self, stream: Stream) -> None:
        """Queue all of it."""
        check(driver().cuGraphLaunch(self._handle, stream.handle))

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            check(driver().cuGraphExecDestroy(handle))
