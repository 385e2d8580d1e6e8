"""Stream: one source and one sink, with all that happens to a frame between them."""

from __future__ import annotations

import logging
import threading
import time
from fractions import Fraction
from typing import Any

from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.display import displayed
from stepcell.errors import DeviceError, InputError, OutputError, StepcellError
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.postprocess import OutputPostprocessor
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.runtime.media.sink import Sink
from stepcell.runtime.media.source import BadEventCounts, Source, display_name
from stepcell.runtime.streams.deadline import Deadline, LateFrames
from stepcell.runtime.streams.frame_reader import Frame, FrameReader
from stepcell.runtime.streams.frame_writer import FrameWriter
from stepcell.runtime.streams.output_clock import OutputClock
from stepcell.runtime.streams.reconnect import Reconnect
from stepcell.runtime.streams.report import Dropped, Stopped, StreamReport, append_message
from stepcell.runtime.streams.reset_policy import Cause, ResetMonitor, ResetPolicy
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.run_snapshots import SnapshotWriter

__all__ = ["Stream"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class Stream:
    """A stream of frames through a step loop.

    The scheduler calls `begin` once, then for each frame `take`, `preprocess` and, after the step, `deliver`, and at
    the end `end`, `close` and `report`. So a frame passes

        source -> frame reader -> [take] -> preprocessor -> step -> postprocessor -> frame writer -> sink.

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
        decode, convert, latency: times per frame, as in the report.
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
        self.input = display_name(source.name if source else name or "")
        self.name = display_name(name) if name else self.input
        self.sink, self.start, self.limit = sink, start, limit
        self.live = source is None or source.live
        self.monitor = ResetMonitor(reset or ResetPolicy())
        self.frames = self.non_finite = 0
        self.decode, self.convert, self.latency = Latency(), Latency(), Latency()
        self.stopped: Stopped | None = None
        self.failure: StepcellError | None = None
        self.prefix = ""
        self.reader: FrameReader | None = None
        self.writer: FrameWriter | None = None
        self._source, self._reconnect = source, reconnect
        self._clock = clock or OutputClock(Fraction(25), keep=False, name=self.input)
        self._length = source.length if source else None
        self._late = LateFrames(deadline if self.live else None)
        self._preprocessor: Preprocessor | None = None
        self._postprocessor: OutputPostprocessor | None = None
        self._frame: Frame | None = None
        self._to_skip = 0 if self.live else start
        self._preprocess_seconds = self._started = self._ended = 0.0

    @property
    def number(self) -> int:
        """Number of the current frame in the stream."""
        return self.start + self.frames

    @property
    def total(self) -> int | None:
        left = None if self._length is None else max(0, self._length - self.start)
        return min((each for each in (left, self.limit) if each is not None), default=None)

    @property
    def checks_finite(self) -> bool:
        """Whether outputs and states are checked for NaN and Inf."""
        return self.monitor.policy.on_nonfinite != "ignore"

    @property
    def running(self) -> bool:
        return self.reader is not None and self.stopped is None

    @property
    def late(self) -> int:
        return self._late.stepped

    @property
    def dropped(self) -> Dropped:
        return {"late": self._late.dropped, "queue full": self.reader.dropped if self.reader else 0}

    @property
    def resets(self) -> dict[Cause, int]:
        return self.monitor.counts

    @property
    def reconnects(self) -> int:
        return self.reader.reconnects if self.reader else 0

    @property
    def bad_events(self) -> BadEventCounts:
        return self.reader.bad_events if self.reader else {}

    @property
    def written(self) -> int | None:
        """Frames in the output once it is closed, before that 0; None: no output."""
        if self.sink is None:
            return None
        return self.writer.written if self.writer is not None and self.writer.closed is not None else 0

    def holds(self, frames: int) -> bool | None:
        """Whether the output has the stream up to this frame, whatever happens to the process; None: it never will.

        A live source gives no frame twice, so nothing is gained by going back to a frame that was lost.
        """
        if self.writer is None or self.live or self.start + self.writer.whole >= frames:
            return True
        return None if self.writer.closed is not None else False

    @property
    def queued(self) -> dict[str, int]:
        return {
            "input": self.reader.queued if self.reader else 0,
            "output": self.writer.queued if self.writer else 0,
        }

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._started if self._started else 0.0

    def begin(self, contract: StepContract, changed: threading.Condition) -> None:
        """Start the threads that read and write.

        Args:
            contract: contract of the model.
            changed: notified when `ready` or `has_room` may have changed.

        Raises:
            OutputError: the model has no output that the sink takes.
        """
        self._started = time.perf_counter()
        self.reader = FrameReader(
            self._source, changed, name=self.input, drop_oldest=self._late.drop_oldest, reconnect=self._reconnect
        )
        if self.sink is not None:
            self.writer = FrameWriter(self.sink, changed)
            replace = self.monitor.policy.on_nonfinite == "reset"  # NaN was logged, and a picture cannot show it
            self._postprocessor = OutputPostprocessor(contract, self.sink, replace_non_finite=replace)

    @property
    def has_room(self) -> bool:
        """Whether a result can be delivered without waiting, or the writer has failed."""
        return self.writer is None or self.writer.failed or self.writer.has_room

    @property
    def ready(self) -> bool:
        """Whether to call `take`: there is a frame and room for its result, the source ended, or the writer failed."""
        assert self.reader is not None
        if self.writer is not None and self.writer.failed:
            return True
        return self.has_room and (self.reader.queued > 0 or self.reader.ended)

    def take(self) -> bool:
        """Take the next frame to step from the reader, without late and skipped ones; may end the stream.

        Returns:
            Whether there is a frame.

        Raises:
            InputError: the source failed, has no frame, or ends before `start`.
            OutputError: an earlier result could not be written.
        """
        assert self.reader is not None
        if self.writer is not None:
            self.writer.check()
        ended = self.reader.ended  # read before `take`: an error that arrives later is raised by the next call
        while (frame := self.reader.take()) is not None:
            if self._to_skip:
                # The monitor sees skipped frames too, so that it resets as in a run that was not interrupted.
                self.monitor.due(self.start - self._to_skip, frame.array, frame.seconds, frame.connection)
                self._to_skip -= 1
            elif not self._late.drop(frame):
                self._frame = frame
                self.decode.add(frame.decode_seconds)
                return True
        if ended:
            self._end_of_input()
        return False

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

    def preprocess(self, spec: TensorSpec) -> tuple[Arrays, Cause | None]:
        """The inputs of the step for the current frame, and the cause for which to reset the states before it.

        Args:
            spec: input of the model.

        Raises:
            InputError: the frame does not fit the model, or differs in size from the frames before.
        """
        assert self._frame is not None
        array = self._frame.array
        if self._preprocessor is not None and array.shape != self._preprocessor.shape:
            if self.monitor.policy.on_size_change == "stop":
                raise InputError(
                    f"{self.input}: frame {self.number} is {array.shape}, the first one {self._preprocessor.shape}",
                    hint="--on-size-change reset goes on from the initial states, --resize makes all of one size",
                )
            self._preprocessor = None
        cause = self.monitor.due(self.number, array, self._frame.seconds, self._frame.connection)
        started = time.perf_counter()
        if self._preprocessor is None:
            self._preprocessor = Preprocessor(spec, array)
        tensor = self._preprocessor(array)
        self._preprocess_seconds = time.perf_counter() - started
        return {spec.name: tensor}, cause

    def count_reset(self, cause: Cause) -> None:
        """Count a reset of the states, and log it unless it is periodic."""
        self.monitor.counts[cause] += 1
        if cause != "every":
            self.log(f"states reset ({cause})")

    def log(self, message: str) -> None:
        """Log a warning about the current frame."""
        logger.warning(f"{self.prefix}frame {self.number}: {message}")

    def deliver(self, outputs: Arrays) -> float:
        """Postprocess the outputs of the current frame and queue the result for the writer.

        Returns:
            Seconds since the frame arrived.

        Raises:
            StepcellError: the sink takes pixels and the result holds NaN or Inf.
            OutputError: an earlier result could not be written.
        """
        assert self._frame is not None
        started = time.perf_counter()
        if self.writer is not None and self._postprocessor is not None and self._preprocessor is not None:
            result = self._postprocessor(outputs, self._preprocessor)
            self._preprocess_seconds += time.perf_counter() - started
            self.writer.put(result, self._clock.seconds(self._frame))
        self.convert.add(self._preprocess_seconds)
        seconds = time.monotonic() - self._frame.arrived
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
        if self.reader is not None:
            self.reader.stop()
        if self.writer is not None and self.frames:
            self.writer.finish()
        elif self.writer is not None:
            self.writer.abandon()

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
        if self.reader is None and self._source is not None:  # it never began
            self._source.close()
        elif self.reader is not None and not control.aborting:
            self.reader.join()
        try:
            if self.writer is not None:
                self.writer.join(control)
                self._ended = max(self._ended, self.writer.closed or 0.0)
            elif self.sink is not None:
                self.sink.abandon()
        except (OutputError, DeviceError) as error:
            self.failure = self.failure or error
            self.stopped = "error"
        if self.failure is not None and self.sink is not None and self.written:
            some = f"first {self.written} of {self.frames} frames"
            held = f"{self.written} frames before it" if self.written == self.frames else some
            older = ", in place of an older file" if self.sink.replaces else ""
            self.failure = append_message(self.failure, f" ({display_name(self.sink.name)} holds the {held}{older})")

    def _error(self) -> str | None:
        if self.failure is None and self.writer is not None and self.writer.closed is None:
            return f"{display_name(self.writer.sink.name)}: not finished when the run was aborted"
        return displayed(self.failure.message) if self.failure else None

    def report(self, loop: StepLoop, snapshots: SnapshotWriter | None) -> StreamReport:
        """The report of this stream; after `close`."""
        seconds = self.seconds
        size = self._preprocessor.size if self._preprocessor else None
        return StreamReport(
            model=display_name(loop.name),
            backend=loop.description,
            device=loop.device,
            input=self.input,
            output=display_name(self.sink.name) if self.sink else None,
            output_tensor=self._postprocessor.output.name if self._postprocessor else None,
            frame_size=size and (size[1], size[0]),
            first_frame=self.start,
            frames=self.frames,
            written=self.written,
            dropped=self.dropped,
            late=self.late,
            resets=self.resets,
            non_finite=self.non_finite,
            bad_events=self.bad_events,
            reconnects=self.reconnects,
            snapshots=snapshots.written if snapshots else 0,
            failed_snapshots=snapshots.failed if snapshots else 0,
            resumes_at=snapshots.positions.get(self.name) if snapshots else None,
            stopped=self.stopped or "error",
            error=self._error(),
            seconds=round(seconds, 3),
            frames_per_second=round(self.frames / seconds, 2) if seconds else 0.0,
            latency=self.latency.summary(),
            step=loop.latency.summary(),
            decode=self.decode.summary(),
            convert=self.convert.summary(),
            encode=(self.writer.encode if self.writer else Latency()).summary(),
        )
