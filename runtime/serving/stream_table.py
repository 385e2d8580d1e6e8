"""Streams of many clients in the slots of one step loop: what is stepped, what is answered again, what is refused.

The promise: a frame is answered from the state of exactly the frames before it, or by a named error. Nothing here knows
a server; nothing is made on demand, and nothing is retried.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, StepcellError
from stepcell.runtime.loop.slots import Slot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.serving.protocol import CHECK, FrameRequest, RefusedFrame, check_values
from stepcell.runtime.serving.snapshots import StreamSnapshots
from stepcell.runtime.serving.wire import Wire

__all__ = ["Counts", "StreamTable"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


@dataclass
class Counts:
    """What has happened so far, for metrics."""

    frames: int = 0
    repeated: int = 0  # answers that were given again
    evicted: int = 0
    resumed: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by name


@dataclass
class _Stream:
    client: int
    slot: Slot
    next: int = 0  # number of the frame that its state is before
    answer: Arrays | RefusedFrame | None = None  # to the last frame; None: it was answered before a resume
    used: float = 0.0
    saved: int = 0  # frame of its last snapshot


class StreamTable:
    """Clients' streams in the slots of a loop.

    Args:
        loop: opened with slots, none of them attached.
        wire: converts frames.
        slots: number of slots of the loop.
        sample: a frame as the model takes it, for checks before the first stream.
        idle: seconds without a frame after which a stream's slot may be given to another one.
        snapshots: of streams whose server or slot is lost; None: none are written.
        clock: seconds.

    Attributes:
        counts: for metrics.
    """

    def __init__(
        self,
        loop: StepLoop,
        wire: Wire,
        *,
        slots: int,
        sample: Arrays,
        idle: float,
        snapshots: StreamSnapshots | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop, self._wire, self._slots, self._idle = loop, wire, slots, idle
        self._snapshots, self._clock = snapshots, clock
        self._streams: dict[int, _Stream] = {}
        self._sample, self._stepped_at_check = sample, 0
        self.counts = Counts()

    def __len__(self) -> int:
        return len(self._streams)

    def step(self, requests: Sequence[FrameRequest]) -> list[Arrays | RefusedFrame]:
        """Answer frames, in their order: several of one stream are stepped one after the other."""
        for request in requests:  # before any of them takes the slot of an idle stream
            held = self._streams.get(request.stream)
            if held is not None and held.client == request.client:
                held.used = self._clock()
        answers: dict[int, Arrays | RefusedFrame] = {}
        checks = [index for index, request in enumerate(requests) if request.number == CHECK]
        waiting = [index for index in range(len(requests)) if index not in checks]
        while waiting:
            turn: dict[int, int] = {}  # the first request of each stream
            for index in waiting:
                turn.setdefault(requests[index].stream, index)
            answers |= self._turn({index: requests[index] for index in turn.values()})
            waiting = [index for index in waiting if index not in answers]
        answers |= {index: self.check(requests[index].arrays) for index in checks}
        for answer in answers.values():
            if isinstance(answer, RefusedFrame):
                self.counts.refused[answer.name] = self.counts.refused.get(answer.name, 0) + 1
        return [answers[index] for index in range(len(requests))]

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays | RefusedFrame:
        """An empty answer if frames can be stepped: one was since the last check, or one is now, for no stream.

        Args:
            arrays: inputs of the check, which must have arrived as they were sent.
        """
        for name, array in arrays.items():
            if not np.array_equal(array, check_values(array.shape, array.dtype)):
                return RefusedFrame(
                    "FAILED",
                    f"{name}: the server damages arrays: its Python has numpy {np.__version__}, and its back end was "
                    "built for another one (pip install 'numpy<2')",
                )
        if self.counts.frames == self._stepped_at_check:
            try:
                self._step_sample()
            except StepcellError as error:
                return RefusedFrame("FAILED", error.message)
        self._stepped_at_check = self.counts.frames
        return {}

    def close(self) -> None:
        """Write a snapshot of every stream, so that another server, or this one later, continues it; free all slots."""
        for stream in list(self._streams):
            self._release(stream, keep=True)
        if self._snapshots is not None:
            self._snapshots.close()

    def _step_sample(self) -> None:
        if len(self._streams) < self._slots:
            slot = self._loop.attach("check")
            try:
                self._loop.step_slots({slot: self._sample})
            finally:
                self._loop.detach(slot)
        else:  # all are idle: step one of them, and put its state back
            slot = next(iter(self._streams.values())).slot
            state = self._loop.state(slot)
            try:
                self._loop.step_slots({slot: self._sample})
            finally:
                self._loop.load_state(state, slot)

    def _turn(self, requests: Mapping[int, FrameRequest]) -> dict[int, Arrays | RefusedFrame]:
        """Answer at most one frame of each stream."""
        answers: dict[int, Arrays | RefusedFrame] = {}
        stepping: dict[int, FrameRequest] = {}
        for index, request in requests.items():
            try:
                held = self._admit(request)
            except RefusedFrame as refusal:
                answers[index] = refusal
                continue
            if held.next == request.number:
                stepping[index] = request
            else:
                assert held.answer is not None
                answers[index] = held.answer
                self.counts.repeated += 1
        answers |= self._stepped(stepping)
        for request in requests.values():
            held_now = self._streams.get(request.stream)
            if held_now is None or held_now.client != request.client:
                continue
            if held_now.next == 0:  # its first frame could not be stepped
                self._release(request.stream, keep=False)
            elif request.end and held_now.next == request.number + 1:
                self._release(request.stream, keep=False)
                if self._snapshots is not None:
                    self._snapshots.forget(request.stream)
        return answers

    def _admit(self, request: FrameRequest) -> _Stream:
        """The stream of a request whose frame is to be stepped now, or was the last one.

        Raises:
            RefusedFrame: neither.
        """
        held = self._streams.get(request.stream)
        if held is not None and held.client != request.client:
            raise RefusedFrame("OUT_OF_STEP", "this id is in use by another client; START with a new random id")
        if held is not None and (
            held.next == request.number or (held.next == request.number + 1 and held.answer is not None)
        ):
            return held
        if request.number < 0:
            raise RefusedFrame(
                "OUT_OF_STEP", f"frames are numbered from 0, got {request.number}", held.next if held else None
            )
        if held is None and request.start and request.number == 0:
            return self._place(request)
        if held is None or (request.number > held.next and self._snapshots is not None):
            resumed = self._resume(request, held)
            if resumed is not None:
                return resumed
        assert held is not None
        raise RefusedFrame(
            "OUT_OF_STEP", f"got frame {request.number}, the state is that before frame {held.next}", held.next
        )

    def _resume(self, request: FrameRequest, held: _Stream | None) -> _Stream | None:
        """The stream at the frame of a request, by a snapshot; None: `held` is later than every snapshot.

        Raises:
            RefusedFrame: it is at an earlier frame now, or cannot be continued.
        """
        if self._snapshots is None:
            raise RefusedFrame("STATE_LOST", "this server does not have this stream, and writes no snapshots")
        found = self._snapshots.before(request.stream, request.number)
        if held is not None:
            found = [each for each in found if each.frame > held.next]
            if not found:
                return None
        if not found:
            raise RefusedFrame("NO_SNAPSHOT", "this server does not have this stream, and there is no snapshot of it")
        stream = held or self._place(request)
        faults = []
        for snapshot in found:
            try:
                self._snapshots.load(snapshot, request.client, stream.slot)
            except StepcellError as error:
                faults.append(error.message)
                continue
            stream.next, stream.saved, stream.answer = snapshot.frame, snapshot.frame, None
            self.counts.resumed += 1
            if snapshot.frame == request.number:
                return stream
            raise RefusedFrame("RESUMED_AT", "the state is that of a snapshot; send the frames from there", stream.next)
        if held is not None:
            return None
        self._release(request.stream, keep=False)
        raise RefusedFrame("STATE_LOST", "; ".join(faults))

    def _place(self, request: FrameRequest) -> _Stream:
        """Occupy a slot for a stream.

        Raises:
            RefusedFrame: all slots are in use.
        """
        if len(self._streams) == self._slots:
            last = min(self._streams, key=lambda stream: self._streams[stream].used)
            idle = self._clock() - self._streams[last].used
            if idle < self._idle:
                raise RefusedFrame(
                    "FULL", f"all {self._slots} slots are in use; the longest without a frame is so for {idle:.1f} s"
                )
            self._release(last, keep=True)
            self.counts.evicted += 1
        if not self._streams:
            self._loop.reset()  # frees the sizes: the next streams may have others
        stream = _Stream(request.client, self._loop.attach(f"{request.stream:016x}"), used=self._clock())
        self._streams[request.stream] = stream
        return stream

    def _release(self, stream: int, *, keep: bool) -> None:
        """Free the slot of a stream, with a snapshot of its state."""
        held = self._streams.pop(stream)
        if keep and self._snapshots is not None and held.next:
            self._snapshots.write(stream, held.client, held.slot, held.next, last=True)
        self._loop.detach(held.slot)

    def _stepped(self, requests: Mapping[int, FrameRequest]) -> dict[int, Arrays | RefusedFrame]:
        """Step frames in one batch; each by itself if one of them is refused, so that the others are not."""
        answers: dict[int, Arrays | RefusedFrame] = {}
        frames = {}
        for index, request in requests.items():
            stream = self._streams[request.stream]
            # The client has the answers to all frames before this one, so it never asks for one of them again.
            if (
                self._snapshots is not None
                and request.number - stream.saved >= self._snapshots.every
                and self._snapshots.write(request.stream, stream.client, stream.slot, request.number)
            ):
                stream.saved = request.number
            try:
                frames[index] = self._wire.to_model(stream.slot.index, request.arrays)
            except StepcellError as error:
                answers[index] = RefusedFrame("BAD_FRAME", error.message)
        try:
            outputs = self._loop.step_slots({self._slot(requests[index]): frame for index, frame in frames.items()})
        except InputError as error:
            if len(frames) == 1:
                return answers | {index: RefusedFrame("BAD_FRAME", error.message) for index in frames}
            for index in frames:
                answers |= self._stepped({index: requests[index]})
            return answers
        except StepcellError as error:
            logger.warning(f"step: {error.message}")
            return answers | {index: RefusedFrame("FAILED", error.message) for index in frames}
        for index in frames:
            stream = self._streams[requests[index].stream]
            if stream.answer is None:  # its first frame here; the sizes of a loop are those of its first stream
                self._sample = {name: np.zeros_like(array) for name, array in frames[index].items()}
            stream.next += 1
            self.counts.frames += 1
            try:
                stream.answer = self._wire.to_client(stream.slot.index, outputs[stream.slot])
            except StepcellError as error:
                stream.answer = RefusedFrame("NOT_FINITE", error.message)
            answers[index] = stream.answer
        return answers

    def _slot(self, request: FrameRequest) -> Slot:
        return self._streams[request.stream].slot
