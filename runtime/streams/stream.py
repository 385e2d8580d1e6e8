"""Stream: one source and one sink, with all that happens to a frame between them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import DeviceError, InputError, OutputError, StepcellError
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.runtime.media.sink import Sink
from stepcell.runtime.media.source import BadEventCounts, Source, display_name
from stepcell.runtime.streams.deadline import Deadline
from stepcell.runtime.streams.frame_converter import ConvertedFrame
from stepcell.runtime.streams.output_clock import OutputClock
from stepcell.runtime.streams.reconnect import Reconnect
from stepcell.runtime.streams.report import Dropped, Stopped
from stepcell.runtime.streams.reset_policy import Cause, ResetMonitor, ResetPolicy
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.stream_input import StreamInput
from stepcell.runtime.streams.stream_output import StreamOutput

__all__ = ["Stream"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


@dataclass
class _Taken:
    """A frame that was taken and not delivered.

    Attributes:
        converted: the frame.
        cause: for which to reset the states before it.
        error: why the reset policy cannot judge it.
        late: whether it was counted as late.
    """

    converted: ConvertedFrame
    cause: Cause | None
    error: InputError | None
    late: bool


class Stream:
    """A stream of frames through a step loop.

    The scheduler calls `begin` once, then for each frame `take`, `tensor` and, after the step, `deliver`, and at
    the end `end` and `close`. A second frame may be taken before the first one is delivered (`take_ahead`).
    So a frame passes

        source -> frame reader -> frame converter -> [take] -> step -> [deliver] -> frame writer -> sink.

    Three threads read, convert to the input of the model, and convert back and write.

    Args:
        source: read and closed by the thread of its frame reader. None: not opened yet, `reconnect` keeps trying.
        sink: written and closed by the thread of its frame writer. None: frames are only stepped.
        name: for messages, metrics and the slot; by default that of the source.
        reset: when to reset the states; by default only NaN and Inf are checked for, and end the stream.
        start: frames of this stream that were stepped before the states were restored. A source that is not live
            is read up to there without stepping.
        limit: end after stepping this many frames.
        deadline: deadline of the frames of a live source; other frames are never late.
        reconnect: how a lost source is reopened; None: the stream ends with it.
        clock: timestamps of the output; by default one frame after another, at 25 frames per second.

    Attributes:
        input: name of the source, for messages and the report.
        live: whether the source is.
        monitor: applies the reset policy.
        frames: frames stepped.
        non_finite: frames after which NaN or Inf was found.
        decode, latency: times per frame, as in the report.
        incoming, output: where the frames come from, and the results go.
        server_events: what the stream survived on its server, by kind; empty for steps on this machine.
        stopped: why the stream ended; None: it has not.
        failure: the error that ended it, if any.
        prefix: prefix of log messages; set if there are several streams.
    """

    def __init__(
        self,
        source: Source | None,
        sink: Sink | None = None,
        *,
        name: str | None = None,
        reset: ResetPolicy | None = None,
        start: int = 0,
        limit: int | None = None,
        deadline: Deadline | None = None,
        reconnect: Reconnect | None = None,
        clock: OutputClock | None = None,
    ) -> None:
        self.input: str = display_name(source.name if source else name or "")
        self.name: str = display_name(name) if name else self.input
        self.start: int = start
        self.limit: int | None = limit
        self.incoming: StreamInput = StreamInput(
            source, self.input, start=start, deadline=deadline, reconnect=reconnect
        )
        self.live: bool = self.incoming.live
        self.output: StreamOutput = StreamOutput(sink, clock or OutputClock(Fraction(25), keep=False, name=self.input))
        self.monitor: ResetMonitor = ResetMonitor(reset or ResetPolicy())
        self.frames: int = 0
        self.non_finite: int = 0
        self.decode: Latency = Latency()
        self.latency: Latency = Latency()
        self.server_events: dict[str, int] = {}
        self.stopped: Stopped | None = None
        self.failure: StepcellError | None = None
        self.prefix = ""
        self._preprocessor: Preprocessor | None = None
        self._taken: deque[_Taken] = deque()  # the current frame, and the one after it if that was taken ahead
        self._in_step = 0  # how many of these are in a step
        self._to_skip = 0 if self.live else start
        self._checks_frames = True
        self._started = self._ended = 0.0

    @property
    def number(self) -> int:
        """Number of the current frame in the stream."""
        return self.start + self.frames

    @property
    def total(self) -> int | None:
        length = self.incoming.length
        left = None if length is None else max(0, length - self.start)
        return min((each for each in (left, self.limit) if each is not None), default=None)

    @property
    def checks_finite(self) -> bool:
        """Whether outputs and states are checked for NaN and Inf."""
        return self.monitor.policy.on_nonfinite != "ignore"

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the frames; None: none was stepped."""
        return self._preprocessor.size if self._preprocessor else None

    @property
    def running(self) -> bool:
        return self.incoming.reader is not None and self.stopped is None

    @property
    def late(self) -> int:
        return self.incoming.late.stepped

    @property
    def dropped(self) -> Dropped:
        return self.incoming.dropped

    @property
    def resets(self) -> dict[Cause, int]:
        return self.monitor.counts

    @property
    def reconnects(self) -> int:
        return self.incoming.reconnects

    @property
    def bad_events(self) -> BadEventCounts:
        return self.incoming.bad_events

    def holds(self, frames: int) -> bool | None:
        """Whether the output has the stream up to this frame, whatever happens to the process; None: it never will.

        A live source gives no frame twice, so nothing is gained by going back to a frame that was lost.
        """
        return True if self.live else self.output.holds(frames - self.start)

    @property
    def queued(self) -> dict[str, int]:
        return {"input": self.incoming.queued, "output": self.output.queued}

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._started if self._started else 0.0

    def begin(
        self,
        contract: StepContract,
        spec: TensorSpec,
        changed: threading.Condition,
        *,
        check_frames: bool = True,
        ahead: int = 1,
    ) -> None:
        """Start the threads that read, convert and write.

        Args:
            contract: contract of the model.
            spec: its input of frames.
            changed: notified when `ready` or `has_room` may have changed.
            check_frames: look for NaN and Inf in frames, unless the policy ignores them.
            ahead: how many frames are converted before they are taken.

        Raises:
            OutputError: the model has no output that the sink takes.
        """
        self._started = time.perf_counter()
        self._checks_frames = check_frames and self.checks_finite
        self.incoming.begin(changed, spec, ahead=ahead, check_finite=self._checks_frames)
        self.output.begin(contract, changed, self.monitor.policy.on_nonfinite)

    @property
    def has_room(self) -> bool:
        """Whether the result of one more step can be delivered without waiting, or the writer has failed."""
        return self.output.has_room(self._in_step)

    @property
    def ready(self) -> bool:
        """Whether to call `take`: there is a frame and room for its result, the source ended, or the writer failed."""
        if self.output.failed:
            return True
        return self.has_room and (len(self._taken) > self._in_step or self.incoming.ready or self.incoming.ended)

    @property
    def expected(self) -> bool:
        """Whether `ready` will be true soon: a frame is being converted, or can be read at any time."""
        return self.has_room and self.incoming.expected

    def take(self) -> bool:
        """Take the next frame to step from the reader, without late and skipped ones; may end the stream.

        Returns:
            Whether there is a frame.

        Raises:
            InputError: the source failed, has no frame, or ends before `start`.
            OutputError: an earlier result could not be written.
        """
        self.output.check()
        if self._taken:
            return True
        ended = self.incoming.ended  # read before `take`: an error that arrives later is raised by the next call
        while (converted := self.incoming.take()) is not None:
            frame = converted.frame
            if self._to_skip:
                # The monitor sees skipped frames too, so that it resets as in a run that was not interrupted.
                self.monitor.due(self.start - self._to_skip, frame.array, frame.seconds, frame.connection)
                self._to_skip -= 1
            elif self._accept(converted):
                return True
        if ended:
            self._end_of_input()
        return False

    def take_ahead(self) -> bool:
        """Take the next frame while steps are under way, if nothing about it depends on how these end.

        A frame that was taken and does depend on it is returned by the next `take`.

        Returns:
            Whether it may be stepped: it resets no states, has the size of the frames before, was converted and is not
            known to hold NaN or Inf, and the limit does not come before it.
        """
        last = self.limit is not None and self.frames + len(self._taken) >= self.limit
        if self.output.failed or not self.has_room or self._to_skip or last:
            return False
        while len(self._taken) == self._in_step and self.incoming.ready:
            converted = self.incoming.take()
            assert converted is not None
            self._accept(converted)
        if len(self._taken) == self._in_step or self._preprocessor is None:
            return False
        taken = self._taken[-1]
        plain = taken.cause is None and taken.error is None and taken.converted.error is None
        same_size = taken.converted.frame.array.shape == self._preprocessor.shape
        return plain and same_size and (taken.converted.finite or not self._checks_frames)

    def _accept(self, converted: ConvertedFrame) -> bool:
        """Keep a frame that is not dropped as late, with the answer of the reset policy."""
        frame, late = converted.frame, self.incoming.late.stepped
        if self.incoming.late.drop(frame):
            self.incoming.release(converted)
            return False
        taken = _Taken(converted, None, None, self.incoming.late.stepped > late)
        try:
            number = self.number + len(self._taken)
            taken.cause = self.monitor.due(number, frame.array, frame.seconds, frame.connection)
        except InputError as error:
            taken.error = error
        self._taken.append(taken)
        return True

    def _end_of_input(self) -> None:
        if self._to_skip:
            raise InputError(
                f"{self.input}: ends at frame {self.start - self._to_skip}, before frame {self.start} to resume at",
                hint="was the snapshot taken of another input?",
            )
        if self.number == 0:
            dropped = sum(self.dropped.values())
            raise InputError(
                f"{self.input}: " + (f"all its {dropped} frames were dropped" if dropped else "holds no frame"),
                hint="increase --deadline-ms, or step late frames too with --on-late block" if dropped else None,
            )
        self.end("end of input")

    def tensor(self) -> tuple[NDArray[Any], Cause | None]:
        """The input of the step for the frame that was taken last, and the cause for which to reset the states before.

        Raises:
            InputError: the frame does not fit the model, or differs in size from the frames before.
        """
        taken = self._taken[-1]
        converted, array = taken.converted, taken.converted.frame.array
        first = self._preprocessor.shape if self._preprocessor is not None else array.shape
        if array.shape != first and self.monitor.policy.on_size_change == "stop":
            raise InputError(
                f"{self.input}: frame {self.number} is {array.shape}, the first one {first}",
                hint="--on-size-change reset goes on from the initial states, --resize makes all of one size",
            )
        for error in (taken.error, converted.error):
            if error is not None:
                raise error
        assert converted.tensor is not None
        self._preprocessor = converted.preprocessor
        return converted.tensor, taken.cause

    @property
    def frame_is_finite(self) -> bool:
        """Whether the frame that was taken last was checked, and its tensor holds neither NaN nor Inf."""
        return self._taken[-1].converted.finite

    def step_begins(self) -> None:
        """The frame that was taken last is in a step."""
        self._in_step += 1

    def count_reset(self, cause: Cause) -> None:
        """Count a reset of the states, and log it unless it is periodic."""
        self.monitor.counts[cause] += 1
        if cause != "every":
            self.log(f"states reset ({cause})")

    def log(self, message: str) -> None:
        """Log a warning about the current frame."""
        logger.warning(f"{self.prefix}frame {self.number}: {message}")

    def deliver(self, outputs: Arrays) -> float:
        """Queue the result of the current frame for the writer, which converts it.

        Returns:
            Seconds since the frame arrived.

        Raises:
            StepcellError: the sink takes pixels, and the result holds NaN or Inf or a label that is no byte.
            OutputError: an earlier result could not be written.
        """
        converted = self._taken[0].converted
        self.output.put(outputs, converted)
        self._taken.popleft()
        self._in_step -= 1
        self.incoming.release(converted)
        self.decode.add(converted.frame.decode_seconds)
        seconds = time.monotonic() - converted.frame.arrived
        self.latency.add(seconds)
        self.frames += 1
        if self.frames == self.limit:
            self.end("limit")
        return seconds

    def end(self, stopped: Stopped, failure: StepcellError | None = None) -> None:
        """Stop reading, and finish the output; without a frame it is abandoned, and an older file stays.

        Returns at once; `close` waits. The first call counts.
        """
        if self.stopped is not None:
            return
        self.stopped, self.failure = stopped, failure
        self._ended = time.perf_counter()
        self._started = self._started or self._ended
        while len(self._taken) > 1:  # it is not stepped, whatever is under way
            self.incoming.late.stepped -= self._taken.pop().late
        self.incoming.stop()
        self.output.end(keep=self.frames > 0)

    def close(self, control: RunControl) -> None:
        """Wait until source and sink are closed, unless the run is aborted; sets `failure` if the sink failed.

        Ctrl-C during a stop aborts the run.
        """
        try:
            self._close(control)
        except KeyboardInterrupt:
            if not control.stopping:
                raise
            control.abort()

    def _close(self, control: RunControl) -> None:
        self.incoming.close(control)
        try:
            self._ended = max(self._ended, self.output.close(control))
        except (OutputError, DeviceError) as error:
            self.failure = self.failure or error
            self.stopped = "error"
        self.failure = self.failure and self.output.with_frames(self.failure, self.frames)
