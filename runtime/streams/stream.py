"""One stream on its way through a loop: where it comes from, where it goes, and what it counts."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, OutputError, StepcellError
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.preprocess import FrameAdapter, to_pixels
from stepcell.runtime.media.sinks import Sink
from stepcell.runtime.media.sources import Source, shown
from stepcell.runtime.streams.frame_reader import Feed, Frame, Reconnect
from stepcell.runtime.streams.frame_writer import Writer
from stepcell.runtime.streams.output_choice import choose_output, result_of
from stepcell.runtime.streams.report import Dropped, RunReport, Stopped, with_rest
from stepcell.runtime.streams.reset_policy import Cause, ResetPolicy, ResetWatch
from stepcell.runtime.streams.shutdown import StopRequest
from stepcell.runtime.streams.snapshot_writer import SnapshotWriter

__all__ = ["Deadline", "Lane", "OnLate"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
OnLate = Literal["drop", "block"]


@dataclass(frozen=True)
class Deadline:
    """How old a frame of a live source may be when its step begins.

    Attributes:
        seconds: since it was read.
        on_late: "drop": an older frame is not stepped, and where frames come faster than they are
            stepped the oldest gives way. "block": it is stepped and counted, and the source waits.
    """

    seconds: float
    on_late: OnLate = "drop"


class Lane:
    """A stream before, in and after a run.

    Args:
        source: frames; read and closed in a thread of its own. None: it could not be opened yet,
            and `reconnect` goes on trying.
        sink: None: frames are only stepped. Written and closed in a thread of its own.
        name: for messages, metrics and the slot; by default the source's.
        resets: says when to forget; by default only NaN and Inf are looked for, and end the stream.
        start: frames of this stream that the loop has stepped already: a source that starts from
            its beginning is read up to there.
        limit: stop after this many frames.
        deadline: of frames of a live source; those of a file are never late.
        reconnect: how a lost source is opened again; None: the stream ends with it.
    """

    def __init__(
        self,
        source: Source | None,
        sink: Sink | None = None,
        *,
        name: str | None = None,
        resets: ResetWatch | None = None,
        start: int = 0,
        limit: int | None = None,
        deadline: Deadline | None = None,
        reconnect: Reconnect | None = None,
    ) -> None:
        self.input = shown(source.name if source else name or "")
        self.name = shown(name) if name else self.input
        self.sink, self.start, self.limit = sink, start, limit
        self.live = source is None or source.live
        self.length = source.length if source else None
        self.watch = resets or ResetWatch(ResetPolicy())
        self.frames = self.late = self.non_finite = 0
        self.decode, self.convert, self.latency = Latency(), Latency(), Latency()
        self.stopped: Stopped | None = None  # once it has
        self.failure: StepcellError | None = None
        self.output: TensorSpec | None = None
        self.adapter: FrameAdapter | None = None
        self.feed: Feed | None = None
        self.writer: Writer | None = None
        self._source, self._reconnect = source, reconnect
        self._deadline = deadline if self.live else None
        self._late_dropped = 0
        self._to_skip = 0 if self.live else start
        self._frame: Frame | None = None
        self._connection = 0  # that of the frame before
        self._converting = self.started = self.ended = 0.0
        self.prefix = ""  # of messages, where there are several streams

    @property
    def number(self) -> int:
        """Of the frame at hand, in its stream."""
        return self.start + self.frames

    @property
    def guarded(self) -> bool:
        """Whether NaN and Inf matter."""
        return self.watch.policy.on_nonfinite != "ignore"

    @property
    def running(self) -> bool:
        return self.feed is not None and self.stopped is None

    @property
    def dropped(self) -> Dropped:
        """Frames that were read and not stepped, by reason."""
        return {"late": self._late_dropped, "queue full": self.feed.dropped if self.feed else 0}

    @property
    def resets(self) -> dict[Cause, int]:
        return self.watch.counts

    @property
    def reconnects(self) -> int:
        return self.feed.reconnects if self.feed else 0

    @property
    def written(self) -> int | None:
        """Frames in the output, after `close`; None where there is no output."""
        if self.sink is None:
            return None
        return self.writer.written if self.writer is not None and self.writer.closed is not None else 0

    @property
    def queued(self) -> dict[str, int]:
        """Frames that wait to be stepped and to be written."""
        return {
            "input": self.feed.waiting if self.feed else 0,
            "output": self.writer.waiting if self.writer else 0,
        }

    def begin(self, contract: StepContract, changed: threading.Condition) -> None:
        """Start reading and writing.

        Raises:
            OutputError: the model has no output that the sink takes.
        """
        self.started = time.perf_counter()
        drop = self._deadline is not None and self._deadline.on_late == "drop"
        self.feed = Feed(self._source, changed, name=self.input, drop=drop, reconnect=self._reconnect)
        if self.sink is not None:
            self.writer = Writer(self.sink, changed)
            self.output = choose_output(contract, self.sink)

    @property
    def has_room(self) -> bool:
        """Whether a result could be handed over now, or the writer has failed."""
        return self.writer is None or self.writer.failed or self.writer.ready

    @property
    def ready(self) -> bool:
        """Whether `take` has something to do: a frame and room for its result, an end or a failure."""
        assert self.feed is not None
        if self.writer is not None and self.writer.failed:
            return True
        return self.has_room and (self.feed.waiting > 0 or self.feed.ended)

    def take(self) -> bool:
        """Take the next frame to be stepped, if there is one now; the stream may end here.

        Raises:
            InputError: the source broke, holds no frame, or ends before `start`.
            OutputError: an earlier result could not be written.
        """
        assert self.feed is not None
        if self.writer is not None:
            self.writer.check()
        ended = self.feed.ended  # asked first: what ends it after this is raised by the next call
        while (frame := self.feed.take()) is not None:
            if self._to_skip:
                # The policies see it, so that they go on where they were.
                self.watch.due(self.start - self._to_skip, frame.array, frame.seconds)
                self._to_skip -= 1
            elif not self._is_late(frame):
                self._frame = frame
                self.decode.add(frame.reading)
                return True
        if ended:
            self._end_of_input()
        return False

    def _is_late(self, frame: Frame) -> bool:
        if self._deadline is None or time.monotonic() - frame.arrived <= self._deadline.seconds:
            return False
        if self._deadline.on_late == "block":
            self.late += 1
            return False
        self._late_dropped += 1
        return True

    def _end_of_input(self) -> None:
        if self._to_skip:
            raise InputError(
                f"{self.input}: ends at frame {self.start - self._to_skip}, before frame {self.start} to go on from",
                hint="was the snapshot taken of another input?",
            )
        if self.number == 0:
            dropped = sum(self.dropped.values())
            raise InputError(
                f"{self.input}: " + (f"all its {dropped} frames were dropped" if dropped else "holds no frame"),
                hint="--deadline-ms allows more, or --on-late block steps late frames too" if dropped else None,
            )
        self.end("end of input")

    def inputs(self, spec: TensorSpec) -> tuple[Arrays, Cause | None]:
        """What the step takes of the frame at hand, and why to forget the past before it.

        Raises:
            InputError: it is not what the model takes, or another size than the frames before.
        """
        frame = self._frame
        assert frame is not None
        if self.adapter is not None and frame.array.shape != self.adapter.shape:
            raise InputError(
                f"{self.input}: frame {self.number} is {frame.array.shape}, the first one {self.adapter.shape}"
            )
        cause = self.watch.due(self.number, frame.array, frame.seconds)
        last, self._connection = self._connection, frame.connection
        if cause is None and frame.connection != last and self.watch.policy.gap is None:
            cause = "gap"  # nobody knows what was missed
        started = time.perf_counter()
        if self.adapter is None:
            self.adapter = FrameAdapter(spec, frame.array)
        tensor = self.adapter.to_input(frame.array)
        self._converting = time.perf_counter() - started
        return {spec.name: tensor}, cause if self.number else None

    def forget(self, cause: Cause) -> None:
        """Count a reset, and log it with its frame."""
        self.watch.counts[cause] += 1
        if cause != "every":
            self.log(f"states reset ({cause})")

    def log(self, message: str) -> None:
        """One line about the frame at hand."""
        logger.warning(f"{self.prefix}frame {self.number}: {message}")

    def deliver(self, outputs: Arrays) -> float:
        """Hand the results of the frame at hand to the writer; seconds since the frame arrived.

        Raises:
            StepcellError: a picture is asked for and the result holds NaN or Inf.
            OutputError: an earlier result could not be written.
        """
        started = time.perf_counter()
        if self.writer is not None and self.output is not None and self.adapter is not None:
            result = result_of(self.output, outputs[self.output.name], self.adapter)
            if self.writer.sink.takes_pixels:
                if self.watch.policy.on_nonfinite == "reset":
                    # What is left has been logged, and a picture has no NaN.
                    result = np.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0)
                result = to_pixels(self.output, result)
            self._converting += time.perf_counter() - started
            self.writer.put(result)
        self.convert.add(self._converting)
        assert self._frame is not None
        seconds = time.monotonic() - self._frame.arrived
        self.latency.add(seconds)
        self.frames += 1
        if self.frames == self.limit:
            self.end("limit")
        return seconds

    def end(self, stopped: Stopped, failure: StepcellError | None = None) -> None:
        """Read no further, and finish what was written as a valid file.

        Where nothing was written, a file that was there before is left alone.
        """
        if self.stopped is not None:
            return
        self.stopped, self.failure = stopped, failure
        self.ended = time.perf_counter()
        self.started = self.started or self.ended
        if self.feed is not None:
            self.feed.stop()
        if self.writer is not None and self.frames:
            self.writer.finish()
        elif self.writer is not None:
            self.writer.abandon()

    def close(self, stop: StopRequest) -> None:
        """Wait until the source and the sink are closed; a failure of the sink is the stream's.

        A failure says how many frames the output holds.
        """
        try:
            self._close(wait=not stop.hurried)
        except KeyboardInterrupt:
            if stop.signal is None:
                raise
            stop.hurried = True

    def _close(self, *, wait: bool) -> None:
        if self.feed is not None:
            if wait:
                self.feed.wait()
        elif self._source is not None:  # it never began
            self._source.close()
        try:
            if self.writer is not None:
                if wait:
                    self.writer.wait()
                self.ended = max(self.ended, self.writer.closed or 0.0)
            elif self.sink is not None:
                self.sink.abandon()
        except OutputError as error:
            self.failure = self.failure or error
            self.stopped = "error"
        if self.failure is not None and self.sink is not None and self.written:
            some = f"first {self.written} of {self.frames} frames"
            held = f"{self.written} frames before it" if self.written == self.frames else some
            older = ", in place of an older file" if self.sink.replaces else ""
            self.failure = with_rest(self.failure, f" ({shown(self.sink.name)} holds the {held}{older})")

    def _error(self) -> str | None:
        if self.failure is None and self.writer is not None and self.writer.closed is None:
            return f"{shown(self.writer.sink.name)}: not finished when a further signal came"
        return shown(self.failure.message) if self.failure else None

    def report(self, loop: StepLoop, snapshots: SnapshotWriter | None) -> RunReport:
        """What this stream did; after `close`."""
        seconds = self.ended - self.started
        return RunReport(
            model=shown(loop.name),
            backend=loop.description,
            device=loop.device,
            input=self.input,
            output=shown(self.sink.name) if self.sink else None,
            output_tensor=self.output.name if self.output else None,
            frame_size=(self.adapter.size[1], self.adapter.size[0]) if self.adapter else None,
            first_frame=self.start,
            frames=self.frames,
            written=self.written,
            dropped=self.dropped,
            late=self.late,
            resets=self.resets,
            non_finite=self.non_finite,
            reconnects=self.reconnects,
            snapshots=snapshots.written if snapshots else 0,
            failed_snapshots=snapshots.failed if snapshots else 0,
            stopped=self.stopped or "error",
            error=self._error(),
            seconds=round(seconds, 3),
            frames_per_second=round(self.frames / seconds, 2) if seconds else 0.0,
            latency=self.latency.summary(),
            step=loop.statistics.summary(),
            decode=self.decode.summary(),
            convert=self.convert.summary(),
            encode=(self.writer.encode if self.writer else Latency()).summary(),
        )
