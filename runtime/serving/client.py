"""The client's side of a stream: numbers, ids, retries and replay; no frame is lost or stepped twice unnoticed."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.errors import StepcellError
from stepcell.runtime.serving.protocol import FrameRequest, NotAnswered, RefusedFrame

__all__ = ["EventKind", "StreamClient", "StreamEvent", "Transport", "replay_length"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds before a retry

Arrays = dict[str, NDArray[Any]]
EventKind = Literal["unreachable", "resumed", "restarted", "replayed", "lost"]


class Transport(Protocol):
    """Carries one request at a time to a server."""

    def infer(self, request: FrameRequest) -> Arrays:
        """The outputs, each with a first axis of size 1.

        Raises:
            RefusedFrame: a named error.
            NotAnswered: the request may have been stepped or not.
            StepcellError: a request that the server will never take.
        """

    def snapshot_every(self) -> int | None:
        """Frames between two snapshots of a stream; None: none are written."""

    def close(self) -> None:
        """End the connection."""


class StreamEvent(NamedTuple):
    """Something that a stream survived.

    Attributes:
        kind: "unreachable": a request was not answered, and is sent again. "resumed": the server's state was lost, and
            is that before `frame` again. "restarted": it was lost, and all frames since the first are sent again.
            "replayed": all frames before `frame` have been sent again; the state is as if nothing had happened.
            "lost": it is not, and `restart()` begins a new stream.
        frame: number of a frame.
        reason: for people.
    """

    kind: EventKind
    frame: int
    reason: str


def replay_length(snapshot_every: int | None) -> int:
    """Frames to keep: of two intervals, for a snapshot that was asked for and is not written yet."""
    return 2 * (snapshot_every or 16) + 8


class StreamClient:
    """A stream of frames on a server that `stepcell triton-repo` set up. Use it in a `with` statement.

    Frames are sent one by one, each when the one before is answered. What was sent since the last snapshots is kept: a
    stream that moves to another server, or whose server is started again, is continued by sending those frames again.

    Args:
        url: `host:port` or `http://host:port`; `grpc://host:port`. The package `stepcell[client]` is needed.
        model: name of the model on the server.
        timeout: seconds until a request counts as not answered.
        deadline: seconds without any answer until `step` raises an error.
        replay: number of last frames to keep; None: enough for the snapshots of this server.
        shared_memory: pass frames and answers through memory that the server, which must run on this machine, shares.
        on_event: called with what happens to the stream.
        transport: instead of `url`, for tests and other servers.

    Attributes:
        stream: the random id of the stream, of 62 bits.

    Raises:
        MissingDependencyError: tritonclient is not installed.
        UsageError: a malformed URL.
        NotAnswered: the server does not answer, or does not have the model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 10.0,
        deadline: float = 60.0,
        replay: int | None = None,
        shared_memory: bool = False,
        on_event: Callable[[StreamEvent], None] | None = None,
        transport: Transport | None = None,
    ) -> None:
        if transport is None:
            from stepcell.runtime.serving.triton_transport import TritonTransport

            transport = TritonTransport(url, model, timeout=timeout, shared_memory=shared_memory)
        self._transport, self._deadline = transport, deadline
        self._on_event = on_event or (lambda _event: None)
        if replay is None:
            replay = replay_length(transport.snapshot_every())
        self._sent: deque[tuple[int, Arrays]] = deque(maxlen=replay)
        self._answered = True  # the last request
        self._interrupted = threading.Event()
        self._lost: RefusedFrame | None = None
        self.restart()

    def restart(self) -> None:
        """End the stream, and begin a new one with the next frame, from the model's initial state."""
        self._end()
        self.stream: int = secrets.randbits(62) + 1
        self._client = secrets.randbits(62)
        self._next, self._begins = 0, True
        self._lost = None

    def step(self, /, **inputs: ArrayLike) -> Arrays:
        """Send the next frame; returns its answer, from the state of exactly the frames before it.

        Args:
            inputs: by name, without an axis of streams: pixels (H, W, C) uint8, RGB, or the model's tensor, as the
                model was set up. They are copied.

        Returns:
            Outputs by name, without an axis of streams.

        Raises:
            RefusedFrame: the frame cannot be stepped (BAD_FRAME: send another one), all slots are in use (FULL), or the
                state is lost for good: then `restart` is needed.
            NotAnswered: no answer within the deadline. The frame counts as sent: it is stepped before the next one.
        """
        if self._lost is not None:
            raise RefusedFrame(self._lost.name, f"{self._lost.reason}; restart() begins a new stream")
        number = self._next
        self._sent.append((number, {name: np.array(value, order="C")[None] for name, value in inputs.items()}))
        self._next += 1
        try:
            return {name: array[0] for name, array in self._answer(number).items()}
        except RefusedFrame as refusal:
            if refusal.name == "BAD_FRAME" or (refusal.name == "FULL" and number == 0):
                self._sent.pop()
                self._next = number
            elif refusal.name not in ("NOT_FINITE", "FULL", "FAILED"):
                self._lost = refusal
                self._on_event(StreamEvent("lost", number, refusal.message))
            raise

    def close(self) -> None:
        """End the stream, which frees its slot, and the connection."""
        self._end()
        self._transport.close()

    def interrupt(self) -> None:
        """Let a call of `step` in another thread, and all later ones, wait no more for a server that is away."""
        self._interrupted.set()

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> None:
        """Free the slot of the stream."""
        if self._sent and self._answered and self._lost is None:
            number, arrays = self._sent[-1]
            # The last frame again, which is not stepped twice. If this fails, the slot is free once it is idle.
            with contextlib.suppress(StepcellError):
                self._transport.infer(self._request(number, arrays, end=True))
        self._sent.clear()

    def _request(self, number: int, arrays: Mapping[str, NDArray[Any]], *, end: bool = False) -> FrameRequest:
        return FrameRequest(self.stream, self._client, number, arrays, start=self._begins or number == 0, end=end)

    def _answer(self, number: int) -> Arrays:
        """The answer to a frame, after all frames before it that the server does not have."""
        sending, first, pause = number, number, _FIRST_PAUSE
        progress = time.monotonic()
        while True:
            try:
                answer = self._transport.infer(self._request(sending, self._kept(sending)))
            except NotAnswered as error:
                self._answered = False
                if time.monotonic() - progress > self._deadline or self._interrupted.is_set():
                    raise
                self._on_event(StreamEvent("unreachable", sending, error.message))
                self._begins = True  # the next request may reach another server
            except RefusedFrame as refusal:
                self._answered = True
                waits = refusal.name == "FAILED" or (refusal.name == "FULL" and sending > 0)
                if time.monotonic() - progress > self._deadline or not (waits or self._can_go_to(refusal, number)):
                    raise
                if waits and self._interrupted.is_set():
                    raise
                if not waits:
                    sending = 0 if refusal.frame is None else refusal.frame
                    first = min(first, sending)
                    self._on_event(
                        StreamEvent("restarted" if refusal.frame is None else "resumed", sending, refusal.message)
                    )
                    continue
            else:
                self._begins, self._answered = False, True
                if sending == number:
                    if first < number:
                        self._on_event(StreamEvent("replayed", number, f"frames {first} to {number - 1}"))
                    return answer
                sending, progress, pause = sending + 1, time.monotonic(), _FIRST_PAUSE
                continue
            self._interrupted.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _can_go_to(self, refusal: RefusedFrame, number: int) -> bool:
        """Whether the frames that the server lacks are still here."""
        oldest = self._sent[0][0]
        if refusal.name in ("OUT_OF_STEP", "RESUMED_AT"):
            return refusal.frame is not None and oldest <= refusal.frame <= number
        return refusal.name in ("NO_SNAPSHOT", "STATE_LOST") and oldest == 0 < number

    def _kept(self, number: int) -> Arrays:
        return self._sent[number - self._sent[0][0]][1]
