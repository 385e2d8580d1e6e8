"""Scheduler: steps the frames of all streams, between the threads that read and those that write."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import DeviceError, InputError, StepcellError
from stepcell.library_errors import as_stepcell_error
from stepcell.runtime.loop.inputs import require_finite
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.slots import Slot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.preprocess import image_input
from stepcell.runtime.streams.non_finite import STATES_EVERY, first_non_finite, non_finite_rows
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.report import Stopped, StreamReport, with_name
from stepcell.runtime.streams.reset_policy import Cause
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.run_snapshots import SnapshotWriter
from stepcell.runtime.streams.stream import Stream
from stepcell.runtime.streams.watchdog import Watchdog

__all__ = ["POLL_SECONDS", "Scheduler", "StepTimes"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
POLL_SECONDS = 0.1  # interval at which the run control is looked at while the run waits
# A step costs the same for one slot as for all, so it waits this many seconds for frames that are being read from
# files, and before the first step for those of every source.
GATHER_SECONDS, GATHER_FIRST_SECONDS = 0.01, 2.0


class StepTimes(Protocol):
    """Receives the time of every step and frame, such as `Metrics`."""

    def step(self, seconds: float) -> None:
        """Time of a step of the batch."""

    def frame(self, stream: Stream, seconds: float) -> None:
        """Latency of a frame, from its arrival until its result was queued for the output."""


class Scheduler:
    """Runs streams through a loop: one stream has the loop to itself, several are slots of one batch.

    Each step takes the frames that are ready, so a stream that is slow, lost or at its end does not hold up the
    others. However a stream ends, its output is finished as a valid file, and the others go on.

    Args:
        loop: a model with one input of pictures or events; for several streams opened with a slot for each. A slot
            attached under the name of a stream continues from its states, and so does a loop without slots whose
            stream has a `start`; all other streams start from the initial states.
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
        loop: StepLoop,
        streams: Sequence[Stream],
        *,
        contract: StepContract | None = None,
        snapshots: SnapshotWriter | None = None,
        control: RunControl | None = None,
        times: StepTimes | None = None,
        progress: Callable[[RunProgress], None] | None = None,
    ) -> None:
        self._loop, self._streams, self._snapshots = loop, streams, snapshots
        self._contract = contract or loop.contract
        self._control = control or RunControl()
        self._times, self._progress = times, progress
        self._steps = 0
        self._resets = self._control.resets  # requests for a reset that were passed on
        self._in_step = False  # after a KeyboardInterrupt inside a step, the states may be old or new
        self._shared = len(streams) > 1
        self._slots: dict[Stream, Slot] = {}
        self._changed = threading.Condition()
        self._check_frames = loop.check_finite
        self._shape: tuple[int, ...] | None = None  # of the input of every stream
        self._watchdog = Watchdog(loop.name, loop.interrupt, self._control.give_up)

    def run(self) -> list[StreamReport]:
        """Step until every stream has ended or a stop is requested; returns the reports of the streams.

        Raises:
            KeyboardInterrupt: unless a stop was requested before; the sinks are closed nevertheless.
        """
        self._loop.check_finite = False  # each stream has a policy of its own
        self._watchdog.start()
        try:
            self._run()
        except StepcellError as error:  # of the loop, and so of every stream
            self._end("error", error)
        except MemoryError as error:
            self._end("error", as_stepcell_error(error, self._loop.name))
        except KeyboardInterrupt:
            if not self._control.stopping:
                raise
        finally:
            self._watchdog.close()
            self._loop.check_finite = self._check_frames
            self._end("interrupted")
            with contextlib.ExitStack() as closing:  # closes every stream, even if one raises
                for stream in reversed(self._streams):
                    closing.callback(stream.close, self._control)
        if self._steps and not self._in_step and not all(stream.failure for stream in self._streams):
            self._save_snapshot()
        if self._snapshots is not None:
            self._snapshots.flush()
        self._report_progress()
        return [stream.report(self._loop, self._snapshots) for stream in self._streams]

    def _run(self) -> None:
        self._loop.latency = Latency()
        self._report_progress()
        self._spec = image_input(self._contract, len(self._streams))
        self._prepare_states()
        for stream in self._streams:
            with self._isolated(stream):
                stream.begin(self._contract, self._spec, self._changed, check_frames=self._check_frames)
        while not self._control.stopping and (running := [stream for stream in self._streams if stream.running]):
            batch = self._take(running)
            if batch:
                self._step(batch)
            else:
                self._wait(lambda: any(stream.ready for stream in running), POLL_SECONDS)
            self._report_progress()

    def _report_progress(self) -> None:
        if self._progress is not None:
            self._progress(RunProgress(self._streams, self._loop.latency))

    def _prepare_states(self) -> None:
        """Attach a slot for each of several streams; reset all states but those that are continued."""
        if not any(stream.start for stream in self._streams):
            self._loop.reset()
        if not self._shared:
            return
        names = {stream.name: stream for stream in self._streams}
        for name, slot in self._loop.slots.items():
            if name in names:
                self._slots[names[name]] = slot
            else:
                self._loop.detach(slot)
        for stream in self._streams:
            stream.prefix = f"{stream.name}: "
            if stream not in self._slots:
                self._slots[stream] = self._loop.attach(stream.name)
            elif not stream.start:
                self._loop.reset([self._slots[stream]])

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

    def _step(self, batch: Sequence[Stream]) -> None:
        self._pass_on_resets()
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
                    self._reset(stream, cause)
                inputs[stream] = {self._spec.name: tensor}
        if not inputs:
            return
        self._in_step = True
        outputs = self._step_finite(inputs, tainted)
        for stream, results in outputs.items():
            with self._isolated(stream):
                seconds = stream.deliver(results)
                if self._times is not None:
                    self._times.frame(stream, seconds)
        self._steps += 1
        self._in_step = False
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
        if not (self._check_frames and stream.checks_finite) or stream.frame_is_finite:
            return False
        try:
            require_finite(f"{stream.prefix}frame {stream.number}: {self._spec.name}", tensor)
        except InputError as error:
            if stream.monitor.policy.on_nonfinite == "stop":
                hint = "clean the frame, or --on-nonfinite reset steps it and goes on from the initial states"
                raise InputError(error.message, hint=hint) from error
            return True
        return False

    def _step_loop(self, inputs: dict[Stream, Arrays]) -> dict[Stream, Arrays]:
        started = time.perf_counter()
        self._watchdog.begin(lambda: ", ".join(f"{stream.name}: frame {stream.number}" for stream in inputs))
        try:
            if self._shared:
                found = self._loop.step_slots({self._slots[stream]: arrays for stream, arrays in inputs.items()})
                outputs = {stream: found[self._slots[stream]] for stream in inputs}
            else:
                outputs = {stream: self._loop.step(**arrays) for stream, arrays in inputs.items()}
        finally:
            self._watchdog.end()
        if self._times is not None:
            self._times.step(time.perf_counter() - started)
        return outputs

    def _reset(self, stream: Stream, cause: Cause) -> None:
        if self._shared:
            self._loop.reset([self._slots[stream]])
        else:
            # A mask keeps the sizes, and so the buffers. A frame of another size needs states of another size, and a
            # model without an axis of streams takes no mask.
            known = self._loop.latency.first is not None and cause != "size"
            masks = all(state.batch_axis is not None for state in self._loop.contract.states)
            self._loop.reset([True] if known and masks else None)
        stream.count_reset(cause)

    def _step_finite(self, inputs: dict[Stream, Arrays], tainted: Collection[Stream]) -> dict[Stream, Arrays]:
        """Step; streams with NaN or Inf are ended, or stepped again from the initial states, as their policy says.

        Args:
            inputs: inputs of the streams.
            tainted: streams whose frame holds NaN or Inf: their states are reset after the step.
        """
        outputs = self._step_loop(inputs)
        for stream in tainted:
            stream.non_finite += 1
            stream.log(f"{self._spec.name}: NaN or Inf in the frame")
            self._reset(stream, "non-finite")
        again: dict[Stream, Arrays] = {}
        rest = {stream: results for stream, results in outputs.items() if stream not in tainted}
        for stream, name in self._non_finite(rest, self._states_to_check(inputs)).items():
            stream.non_finite += 1
            with self._isolated(stream):
                if stream.monitor.policy.on_nonfinite == "stop":
                    outputs.pop(stream, None)
                    raise StepcellError(
                        f"{stream.prefix}frame {stream.number}: {name}: the model returned NaN or Inf",
                        hint="--on-nonfinite reset continues from the initial states; "
                        "float16 models overflow beyond 65504",
                    )
                stream.log(f"{name}: the model returned NaN or Inf")
                self._reset(stream, "non-finite")
                if stream in inputs:
                    again[stream] = inputs[stream]
        if again:
            repeated = self._step_loop(again)
            for stream, name in self._non_finite(repeated, again).items():
                stream.log(f"{name}: NaN or Inf from the initial states too")
                self._reset(stream, "non-finite")
            outputs.update(repeated)
        return outputs

    def _states_to_check(self, inputs: Collection[Stream]) -> list[Stream]:
        """Streams whose states are checked after this step: all before a snapshot, otherwise each now and then."""
        if self._snapshot_due(self._count + 1):
            return [stream for stream in self._streams if not self._shared or stream in self._slots]
        return [stream for stream in inputs if (stream.frames + 1) % STATES_EVERY == 0]

    def _non_finite(self, outputs: dict[Stream, Arrays], states_of: Collection[Stream]) -> dict[Stream, str]:
        """Streams with NaN or Inf that are checked for it, each with the name of such an output or state."""
        found = {}
        for stream, results in outputs.items():
            if stream.checks_finite and (name := first_non_finite(results)):
                found[stream] = name
        if any(stream.checks_finite and stream not in found for stream in states_of):
            rows = non_finite_rows(self._loop.contract, self._loop.state())
            for stream in states_of:
                row = self._slots[stream].index if self._shared else 0
                if stream.checks_finite and row in rows:
                    found.setdefault(stream, rows[row])
        return found

    @property
    def _count(self) -> int:
        """Frames of the only stream, or steps of several: the number that `snapshot_every` refers to."""
        return self._steps if self._shared else self._streams[0].number

    def _snapshot_due(self, count: int) -> bool:
        return self._snapshots is not None and self._snapshots.due(count)

    def _save_snapshot(self) -> None:
        if self._snapshots is not None:
            streams = [stream for stream in self._streams if not self._shared or stream in self._slots]
            frames = {stream: stream.number for stream in streams}
            for stream in streams:
                if stream.writer is not None:
                    stream.writer.drain(self._control)

            def held() -> bool | None:
                answers = [stream.holds(number) for stream, number in frames.items()]
                return None if None in answers else all(answers)

            names = {stream.name: number for stream, number in frames.items()}
            self._snapshots.save(self._loop, self._count, names if self._shared else None, held=held)

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
            if stream in self._slots:
                self._loop.detach(self._slots.pop(stream))

    def _end(self, stopped: Stopped, failure: StepcellError | None = None) -> None:
        """End the streams that still run."""
        for stream in self._streams:
            stream.end(stopped, failure)
