"""Server stepper: the frames of each stream go to a server, in a thread and on a connection of their own."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import get_args

import numpy as np

from stepcell.contract import StepContract
from stepcell.errors import InputError, StepcellError, UsageError
from stepcell.runtime.backends.base import StepFuture
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.snapshot import Snapshot
from stepcell.runtime.serving.client import EventKind, StreamClient, StreamEvent
from stepcell.runtime.serving.protocol import NotAnswered, RefusedFrame
from stepcell.runtime.streams.reset_policy import Cause
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.stepper import Arrays
from stepcell.runtime.streams.stream import Stream

__all__ = ["Connect", "ServerStepper"]

POLL_SECONDS = 0.1  # interval at which the run control is looked at while a step is under way
CLOSE_SECONDS = 2.0  # for the end of all streams on the server; their slots are free once they are idle otherwise

Connect = Callable[[Callable[[StreamEvent], None]], StreamClient]  # from the receiver of its events

_HINTS = {
    "FULL": "end other streams, or give the server more: stepcell triton-repo --slots or --instances",
    "STATE_LOST": "stepcell triton-repo --snapshots lets streams survive the end of a server",
    "NO_SNAPSHOT": "smaller --snapshot-every of stepcell triton-repo, and a folder that all its servers share",
}


class ServerStepper:
    """Steps streams on a server that `stepcell triton-repo` set up; a `Stepper`.

    A step sends the frames of all its streams at the same time, which the server batches, and ends with the last of the
    answers. States are the server's: it checks them when they show in an output.

    Args:
        connect: makes the client of a stream; called in the thread that uses it.
        contract: of the model as clients see it.
        name: of the model.
        description: where it is, for display.
        gives_pixels: whether it answers with pixels.
        control: after a request to stop, a server that is away is not waited for.
    """

    device, overlaps, checks_frames = "server", False, True

    def __init__(
        self,
        connect: Connect,
        contract: StepContract,
        *,
        name: str,
        description: str,
        gives_pixels: bool,
        control: RunControl,
    ) -> None:
        self.name, self.contract, self.description = name, contract, description
        self.gives_pixels = gives_pixels
        self.latency = Latency()
        self._connect, self._control = connect, control
        self._connections: dict[Stream, _Connection] = {}

    def begin(self, streams: Sequence[Stream]) -> None:
        self._connections = {stream: _Connection(stream, self._connect, self.contract) for stream in streams}

    def start(self, inputs: Mapping[Stream, Arrays]) -> StepFuture[Mapping[Stream, Arrays | StepcellError]]:
        started = time.perf_counter()
        for stream, connection in self._connections.items():
            if stream.stopped is not None:
                connection.close()
        answers = {stream: self._connections[stream].step(arrays) for stream, arrays in inputs.items()}

        def collect() -> dict[Stream, Arrays | StepcellError]:
            while concurrent.futures.wait(answers.values(), POLL_SECONDS).not_done:
                if self._control.stopping:
                    self.interrupt()
            found = {stream: answer.result() for stream, answer in answers.items()}
            if self._control.stopping and any(isinstance(each, NotAnswered) for each in found.values()):
                raise KeyboardInterrupt  # the request to stop, which came while the server was away
            self.latency.add(time.perf_counter() - started)
            return found

        return StepFuture(collect)

    def reset(self, stream: Stream, cause: Cause) -> None:
        self._connections[stream].reset()

    def non_finite_states(self, streams: Collection[Stream]) -> Mapping[Stream, str]:
        return {}

    def capture(self, *, frame: int, metadata: Mapping[str, str]) -> tuple[Arrays, Snapshot]:
        raise UsageError("--snapshot: the states are the server's, which writes snapshots of its own")

    def release(self, stream: Stream) -> None:
        self._connections[stream].close()

    def interrupt(self) -> None:
        for connection in self._connections.values():
            connection.interrupt()

    def end(self) -> None:
        ends = time.monotonic() + CLOSE_SECONDS
        for connection in self._connections.values():
            connection.close()
        for connection in self._connections.values():
            connection.join(max(0.0, ends - time.monotonic()))


class _Connection:
    """The client of a stream, and the only thread that uses it: connections of HTTP belong to their thread.

    Args:
        stream: is told what happened.
        connect: makes the client.
        contract: of the answers.
    """

    def __init__(self, stream: Stream, connect: Connect, contract: StepContract) -> None:
        self._stream, self._connect, self._contract = stream, connect, contract
        self._client: StreamClient | None = None
        self._tasks: queue.SimpleQueue[tuple[Arrays, bool, Future[Arrays | StepcellError]] | None] = queue.SimpleQueue()
        self._restarts = self._interrupted = self._closed = False
        self._away: int | None = None  # the frame for which the server was away, which is logged once
        self._frames = 0  # since the last reset
        stream.server_events = dict.fromkeys(get_args(EventKind), 0)
        self._thread = threading.Thread(target=self._run, name=f"send {stream.name}", daemon=True)
        self._thread.start()

    def step(self, arrays: Arrays) -> Future[Arrays | StepcellError]:
        """Send a frame; the future has the answer, or the error that ends the stream."""
        answer: Future[Arrays | StepcellError] = Future()
        restarts, self._restarts = self._restarts, False
        self._tasks.put((arrays, restarts, answer))
        return answer

    def reset(self) -> None:
        """Send the next frame as the first of a new stream."""
        self._restarts = True

    def interrupt(self) -> None:
        """Do not wait for a server that is away."""
        self._interrupted = True
        if self._client is not None:
            self._client.interrupt()

    def close(self) -> None:
        """End the stream after its last frame, once. Returns at once."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            arrays, restarts, answer = task
            try:
                answer.set_result(self._step(arrays, restarts=restarts))
            except StepcellError as error:
                answer.set_result(error)
            except BaseException as error:  # raised in the thread that waits for the answer
                answer.set_exception(error)
        if self._client is not None:
            self._client.close()

    def _step(self, arrays: Arrays, *, restarts: bool) -> Arrays:
        client = self._client
        if client is None:
            client = self._client = self._connect(self._tell)
            if self._interrupted:
                client.interrupt()
        elif restarts:
            client.restart()
            self._frames = 0
        self._frames += 1
        try:
            answer = client.step(**{name: array[0] for name, array in arrays.items()})
        except RefusedFrame as refusal:
            if refusal.name == "NOT_FINITE" and self._frames > 1:
                return self._not_finite()
            if refusal.name == "BAD_FRAME":
                raise InputError(f"frame {self._stream.number}: {refusal.reason}") from refusal
            raise StepcellError(refusal.message, hint=_HINTS.get(refusal.name)) from refusal
        return self._checked({name: array[None] for name, array in answer.items()})

    def _not_finite(self) -> Arrays:
        """What stands for an answer whose pixels are NaN or Inf: the rules of the run apply to it."""
        return {spec.name: np.full((1,) * len(spec.shape), np.nan, np.float32) for spec in self._contract.outputs}

    def _checked(self, answer: Arrays) -> Arrays:
        """The answer, if it is one of the model."""
        for spec in self._contract.outputs:
            array = answer.get(spec.name)
            fits = array is not None and array.dtype == spec.dtype and array.ndim == len(spec.shape)
            if array is None or not fits or 0 in array.shape:
                got = "nothing" if array is None else f"{array.shape} {array.dtype}"
                raise InputError(f"{spec.name}: the server's model answers {spec.shape} {spec.dtype}, got {got}")
        return answer

    def _tell(self, event: StreamEvent) -> None:
        self._stream.server_events[event.kind] += 1
        if event.kind == "unreachable":
            again, self._away = self._away == event.frame, event.frame
            if not again:
                self._stream.log(f"not answered, and sent again until it is ({event.reason})")
        elif event.kind == "replayed":
            self._stream.log(f"the state is as it was: sent again, {event.reason}")
        elif event.kind != "lost":  # that is the error of the stream
            self._stream.log(f"sent again from frame {event.frame} of the stream on the server ({event.reason})")
