"""Scheduler: steps the frames of all streams, between the threads that read and those that write."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import DeviceError, InputError, StepcellError
from stepcell.library_errors import as_stepcell_error
from stepcell.runtime.loop.inputs import require_finite
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.media.preprocess import image_input
from stepcell.runtime.streams.non_finite import STATES_EVERY
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.report import Stopped, StreamReport, with_name
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.run_snapshots import SnapshotWriter
from stepcell.runtime.streams.stepper import Arrays, Stepper
from stepcell.runtime.streams.stepping import Step, Stepping, StepTimes
from stepcell.runtime.streams.stream import Stream
from stepcell.runtime.streams.stream_report import stream_report

__all__ = ["POLL_SECONDS", "Scheduler"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # interval at which the run control is looked at while the run waits
# A step costs the same for one slot as for all, so it waits this many seconds for frames that are being read from
# files, and before the first step for those of every source.
GATHER_SECONDS, GATHER_FIRST_SECONDS = 0.01, 2.0


class Scheduler:
    """Runs streams through a model.

    Each step takes the frames that are ready, so a stream that is slow, lost or at its end does not hold up the
    others. However a stream ends, its output is finished as a valid file, and the others go on.

    Args:
        stepper: of a model with one input of pictures or events.
        streams: a stream that fails has its `failure` set afterwards. A failing device, or a model that takes
            neither pictures nor events, fails all of them.
        contract: what the pictures of the model are; by default its own contract.
        snapshots: written when due, and at the end unless every stream failed.
        control: stops the run and resets states.
        times: receives the time of every step and frame.
        progress: called in this thread at the start, after every step, at least ten times a second, and at the end.
    """

    def __init__(
        self,
        stepper: Stepper,
        streams: Sequence[Stream],
        *,
        contract: StepContract | None = None,
        snapshots: SnapshotWriter | None = None,
        control: RunControl | None = None,
        times: StepTimes | None = None,
        progress: Callable[[RunProgress], None] | None = None,
    ) -> None:
        self._stepper, self._streams, self._snapshots = stepper, streams, snapshots
        self._contract = contract or stepper.contract
        self._control = control or RunControl()
        self._times, self._progress = times, progress
        self._steps = 0
        self._resets = self._control.resets  # requests for a reset that were passed on
        self._in_step = False  # after a KeyboardInterrupt inside a step, the states may be old or new
        self._shared = len(streams) > 1
        self._held = list(streams)  # those that have a state
        self._changed = threading.Condition()
        self._shape: tuple[int, ...] | None = None  # of the input of every stream
        self._stepping = Stepping(stepper, self._isolated, self._control, times)

    def run(self) -> list[StreamReport]:
        """Step until every stream has ended or a stop is requested; returns the reports of the streams.

        Raises:
            KeyboardInterrupt: unless a stop was requested before; the sinks are closed nevertheless.
        """
        try:
            with self._stepping:
                self._run()
        except StepcellError as error:  # of the loop, and so of every stream
            self._end("error", error)
        except MemoryError as error:
            self._end("error", as_stepcell_error(error, self._stepper.name))
        except KeyboardInterrupt:
            if not self._control.stopping:
                raise
        finally:
            self._end("interrupted")
            self._stepper.end()
            with contextlib.ExitStack() as closing:  # closes every stream, even if one raises
                for stream in reversed(self._streams):
                    closing.callback(stream.close, self._control)
        if self._steps and not self._in_step and not all(stream.failure for stream in self._streams):
            self._save_snapshot()
        if self._snapshots is not None:
            self._snapshots.flush()
        self._report_progress()
        return [stream_report(stream, self._stepper, self._snapshots) for stream in self._streams]

    def _run(self) -> None:
        self._stepper.latency = Latency()
        self._report_progress()
        self._spec = image_input(self._contract, len(self._streams))
        if self._shared:
            for stream in self._streams:
                stream.prefix = f"{stream.name}: "
        self._stepper.begin(self._streams)
        for stream in self._streams:
            with self._isolated(stream):
                stream.begin(
                    self._contract,
                    self._spec,
                    self._changed,
                    check_frames=self._stepper.checks_frames,
                    ahead=2 if self._stepper.overlaps else 1,  # one in each of two steps needs another one ready
                )
        step: Step | None = None  # the one under way
        while not self._control.stopping and (running := [stream for stream in self._streams if stream.running]):
            if step is not None:
                batch = self._take_ahead(step, running)
                ahead = self._start_ahead(step, batch) if batch else None
                self._finish(step, ahead)
                step = ahead
            else:
                self._pass_on_resets()
                batch = self._take(running)
                if not batch:
                    self._wait(lambda: any(stream.ready for stream in running), POLL_SECONDS)
                elif (step := self._start(batch)) is not None and not self._stepper.overlaps:
                    self._finish(step)
                    step = None
            self._report_progress()
        if step is not None and step.inputs:
            self._finish(step)
            self._report_progress()
        elif step is not None:
            self._in_step = not self._stepping.abandon(step)

    def _report_progress(self) -> None:
        if self._progress is not None:
            self._progress(RunProgress(self._streams, self._stepper.latency))

    def _take(self, running: Sequence[Stream]) -> list[Stream]:
        """Take a frame from every stream that has one; waits a little for those that are expected to have one."""
        batch = self._take_ready(running)
        if batch and self._shared:
            # A file can be read at any time. When a camera sends its next frame is not known, nor when the output
            # of a stream has room again.
            waiting = [stream for stream in running if stream not in batch and stream.has_room]
            expected = [stream for stream in waiting if self._steps == 0 or stream.expected]
            seconds = GATHER_SECONDS if self._steps else GATHER_FIRST_SECONDS
            self._wait(lambda: all(stream.ready for stream in expected), seconds)
            batch += self._take_ready([stream for stream in expected if stream.running])
        return batch

    def _take_ready(self, streams: Sequence[Stream]) -> list[Stream]:
        batch = []
        for stream in streams:
            with self._isolated(stream):
                if stream.ready and stream.take():
                    batch.append(stream)
        return batch

    def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            # A request to stop does not notify the condition, so it is polled.
            while not self._control.stopping and (left := end - time.monotonic()) > 0:
                if self._changed.wait_for(ready, min(left, POLL_SECONDS)):
                    break

    def _take_ahead(self, step: Step, running: Sequence[Stream]) -> list[Stream]:
        """Take frames to step while a step is under way; none if anything about them depends on how it ends."""
        asked = self._control.resets != self._resets
        if asked or step.tainted or self._snapshot_due(self._count + 1) or self._states_to_check(step.inputs):
            return []
        expected = [stream for stream in running if stream.expected]
        if not all(stream.ready for stream in expected):
            return []
        return expected if all(stream.take_ahead() for stream in expected) else []

    def _start(self, batch: Sequence[Stream]) -> Step | None:
        """Start a step of these streams; None: the frame of each ended its stream."""
        inputs: dict[Stream, Arrays] = {}
        tainted = []
        for stream in batch:
            with self._isolated(stream):
                tensor, cause = stream.tensor()
                if self._shared:
                    self._check_size(stream, tensor)
                if self._is_tainted(stream, tensor):
                    tainted.append(stream)
                if cause is not None:
                    self._stepping.reset(stream, cause)
                inputs[stream] = {self._spec.name: tensor}
        if not inputs:
            return None
        self._in_step = True
        step = self._stepping.start(inputs, tainted)
        for stream in inputs:
            stream.step_begins()
        return step

    def _start_ahead(self, step: Step, batch: Sequence[Stream]) -> Step | None:
        """Start a step while another is under way, which is finished first if that fails."""
        try:
            return self._start(batch)
        except (StepcellError, MemoryError):
            self._finish(step)
            raise

    def _finish(self, step: Step, ahead: Step | None = None) -> None:
        """Deliver the results of a step, and save a snapshot if one is due."""
        outputs, again = self._stepping.finish(step, self._spec.name, self._states_to_check(step.inputs), ahead)
        for stream, results in outputs.items():
            with self._isolated(stream):
                seconds = stream.deliver(results)
                if self._times is not None:
                    self._times.frame(stream, seconds)
        self._steps += 1
        if ahead is not None:
            for stream in [stream for stream in ahead.inputs if not stream.running]:
                ahead.drop(stream)
            self._stepping.repeat(ahead, again)
        self._in_step = ahead is not None
        if outputs and self._snapshot_due(self._count):
            self._save_snapshot()
        elif self._snapshots is not None:
            self._snapshots.flush()

    def _pass_on_resets(self) -> None:
        if self._control.resets != self._resets:
            self._resets = self._control.resets
            for stream in self._streams:
                stream.monitor.demand()

    def _check_size(self, stream: Stream, tensor: NDArray[Any]) -> None:
        """Refuse for one stream what the loop would refuse for the whole batch."""
        self._shape = self._shape or tensor.shape
        if tensor.shape != self._shape:
            raise InputError(
                f"{stream.name}: its input has shape {tensor.shape}, that of the first stream {self._shape}",
                hint="all streams of a run need frames of one size: run this one alone, or --resize WIDTHxHEIGHT",
            )

    def _is_tainted(self, stream: Stream, tensor: NDArray[Any]) -> bool:
        """Whether a frame holds NaN or Inf, and the stream goes on nevertheless.

        Raises:
            InputError: the stream ends with it.
        """
        if not (self._stepper.checks_frames and stream.checks_finite) or stream.frame_is_finite:
            return False
        try:
            require_finite(f"{stream.prefix}frame {stream.number}: {self._spec.name}", tensor)
        except InputError as error:
            if stream.monitor.policy.on_nonfinite == "stop":
                hint = "clean the frame, or --on-nonfinite reset steps it and goes on from the initial states"
                raise InputError(error.message, hint=hint) from error
            return True
        return False

    def _states_to_check(self, inputs: Collection[Stream]) -> list[Stream]:
        """Streams whose states are checked after this step: all before a snapshot, otherwise each now and then."""
        if self._snapshot_due(self._count + 1):
            return list(self._held)
        return [stream for stream in inputs if (stream.frames + 1) % STATES_EVERY == 0]

    @property
    def _count(self) -> int:
        """Frames of the only stream, or steps of several: the number that `snapshot_every` refers to."""
        return self._steps if self._shared else self._streams[0].number

    def _snapshot_due(self, count: int) -> bool:
        return self._snapshots is not None and self._snapshots.due(count)

    def _save_snapshot(self) -> None:
        if self._snapshots is not None:
            frames = {stream: stream.number for stream in self._held}
            for stream in frames:
                stream.output.drain(self._control)

            def held() -> bool | None:
                answers = [stream.holds(number) for stream, number in frames.items()]
                return None if None in answers else all(answers)

            names = {stream.name: number for stream, number in frames.items()}
            self._snapshots.save(self._stepper, self._count, names if self._shared else None, held=held)

    @contextlib.contextmanager
    def _isolated(self, stream: Stream) -> Iterator[None]:
        """An error in the block ends this stream only, unless it is one of the device."""
        try:
            yield
        except DeviceError:
            raise
        except StepcellError as error:
            stream.end("error", error)
            if self._shared:  # the error of the only stream is raised by the run
                logger.warning(f"stream ended: {with_name(stream.name, error)}")
            if stream in self._held:
                self._held.remove(stream)
                self._stepper.release(stream)

    def _end(self, stopped: Stopped, failure: StepcellError | None = None) -> None:
        """End the streams that still run."""
        for stream in self._streams:
            stream.end(stopped, failure)
