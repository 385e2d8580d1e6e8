"""Which stream's frame is stepped when: the loop between the threads that read and those that write."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray

from stepcell.errors import DeviceError, InputError, StepcellError
from stepcell.runtime.loop.inputs import require_finite
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.slots import Slot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.preprocess import image_input
from stepcell.runtime.streams.report import Stopped, blame
from stepcell.runtime.streams.reset_policy import STATES_EVERY, Cause, non_finite, non_finite_rows
from stepcell.runtime.streams.shutdown import StopRequest
from stepcell.runtime.streams.snapshot_writer import SnapshotWriter
from stepcell.runtime.streams.stream import Lane

__all__ = ["Scheduler", "Watcher"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
# Seconds. A signal is noticed within the first. A step costs the same for one slot as for all, so
# frames that are being read from files are waited for a little, and the first ones a little longer.
NOTICE, GATHER, GATHER_FIRST = 0.1, 0.01, 2.0


class Watcher(Protocol):
    """Is told what happens, by the thread that steps."""

    def step(self, seconds: float) -> None:
        """A step of the batch took so long."""

    def frame(self, lane: Lane, seconds: float) -> None:
        """A frame went through in this time, from its arrival until its result was handed to the output."""

    def tick(self) -> None:
        """Between two steps, and ten times a second while there is none."""


class Scheduler:
    """One run: takes what is ready, steps it, and hands the results over; used by `run_streams`."""

    def __init__(
        self,
        loop: StepLoop,
        lanes: Sequence[Lane],
        snapshots: SnapshotWriter | None,
        stop: StopRequest,
        watchers: Sequence[Watcher],
    ) -> None:
        self.loop, self.lanes, self.snapshots, self.stop, self.watchers = loop, lanes, snapshots, stop, watchers
        self.steps = 0
        self.between_steps = True  # else a second ctrl-C came, and nobody knows whether the states are new
        self._shared = len(lanes) > 1
        self._slots: dict[Lane, Slot] = {}
        self._changed = threading.Condition()
        self._shape: tuple[int, ...] | None = None  # of every stream's input

    def go(self) -> None:
        """Until every stream has ended, or a stop is asked for."""
        self._spec = image_input(self.loop.contract, len(self.lanes))
        self.loop.statistics = Latency()
        self._enter()
        for lane in self.lanes:
            with _Failing(self, lane):
                lane.begin(self.loop.contract, self._changed)
        while self.stop.signal is None and (running := [lane for lane in self.lanes if lane.running]):
            batch = self._take(running)
            if batch:
                self._step(batch)
            else:
                self._wait(lambda: any(lane.ready for lane in running), NOTICE)
            for watcher in self.watchers:
                watcher.tick()

    def _enter(self) -> None:
        """Everything at its initial state, except what goes on."""
        if not any(lane.start for lane in self.lanes):
            self.loop.reset()
        if not self._shared:
            return
        names = {lane.name: lane for lane in self.lanes}
        for name, slot in self.loop.slots.items():
            if name in names:
                self._slots[names[name]] = slot
            else:
                self.loop.detach(slot)
        for lane in self.lanes:
            lane.prefix = f"{lane.name}: "
            if lane not in self._slots:
                self._slots[lane] = self.loop.attach(lane.name)
            elif not lane.start:
                self.loop.reset([self._slots[lane]])

    def _take(self, running: Sequence[Lane]) -> list[Lane]:
        """Streams with a frame to be stepped now."""
        batch = self._take_ready(running)
        if batch and self._shared:
            # Files are read as fast as they are stepped; of a camera nobody knows when it sends, nor when
            # an output that is behind will take the next frame.
            waiting = [lane for lane in running if lane not in batch and lane.has_room]
            others = [lane for lane in waiting if self.steps == 0 or not lane.live]
            self._wait(lambda: all(lane.ready for lane in others), GATHER if self.steps else GATHER_FIRST)
            batch += self._take_ready([lane for lane in others if lane.running])
        return batch

    def _take_ready(self, lanes: Sequence[Lane]) -> list[Lane]:
        batch = []
        for lane in lanes:
            with _Failing(self, lane):
                if lane.ready and lane.take():
                    batch.append(lane)
        return batch

    def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            # A signal wakes nobody, so it is looked for.
            while self.stop.signal is None and (left := end - time.monotonic()) > 0:
                if self._changed.wait_for(ready, min(left, NOTICE)):
                    break

    def _step(self, batch: Sequence[Lane]) -> None:
        inputs: dict[Lane, Arrays] = {}
        for lane in batch:
            with _Failing(self, lane):
                arrays, cause = lane.inputs(self._spec)
                if self._shared:
                    self._check(lane, arrays[self._spec.name])
                if cause is not None:
                    self._reset(lane, cause)
                inputs[lane] = arrays
        if not inputs:
            return
        self.between_steps = False
        outputs = self._guarded_step(inputs)
        for lane, results in outputs.items():
            with _Failing(self, lane):
                seconds = lane.deliver(results)
                for watcher in self.watchers:
                    watcher.frame(lane, seconds)
        self.steps += 1
        self.between_steps = True
        if self.snapshots is not None and outputs and self.snapshots.due(self._count):
            self.save(self.snapshots)

    @property
    def _count(self) -> int:
        """What snapshots are counted by: frames of the one stream, or steps."""
        return self.steps if self._shared else self.lanes[0].number

    def _check(self, lane: Lane, tensor: NDArray[Any]) -> None:
        """What the loop would refuse of one stream it would refuse of all."""
        self._shape = self._shape or tensor.shape
        if tensor.shape != self._shape:
            raise InputError(
                f"{lane.name}: its frames become {tensor.shape}, those of the first stream {self._shape}",
                hint="streams that run together have one size; run this one alone",
            )
        require_finite(f"{lane.name}: {self._spec.name}", tensor)

    def _call(self, inputs: dict[Lane, Arrays]) -> dict[Lane, Arrays]:
        started = time.perf_counter()
        if self._shared:
            found = self.loop.step_slots({self._slots[lane]: arrays for lane, arrays in inputs.items()})
            outputs = {lane: found[self._slots[lane]] for lane in inputs}
        else:
            outputs = {lane: self.loop.step(**arrays) for lane, arrays in inputs.items()}
        seconds = time.perf_counter() - started
        for watcher in self.watchers:
            watcher.step(seconds)
        return outputs

    def _reset(self, lane: Lane, cause: Cause) -> None:
        if self._shared:
            self.loop.reset([self._slots[lane]])
        else:
            self.loop.reset([True] if self.loop.statistics.first is not None else None)
        lane.forget(cause)

    def _guarded_step(self, inputs: dict[Lane, Arrays]) -> dict[Lane, Arrays]:
        """A step, and a second one from the initial state for those where the first returns NaN or Inf."""
        outputs = self._call(inputs)
        again: dict[Lane, Arrays] = {}
        for lane, name in self._spoilt(outputs, self._due(inputs)).items():
            lane.non_finite += 1
            with _Failing(self, lane):
                if lane.watch.policy.on_nonfinite == "stop":
                    outputs.pop(lane, None)
                    raise StepcellError(
                        f"{lane.prefix}frame {lane.number}: {name}: the model returned NaN or Inf",
                        hint="--on-nonfinite reset goes on from the initial state; "
                        "float16 models overflow beyond 65504",
                    )
                lane.log(f"{name}: the model returned NaN or Inf")
                self._reset(lane, "non-finite")
                if lane in inputs:
                    again[lane] = inputs[lane]
        if again:
            repeated = self._call(again)
            for lane, name in self._spoilt(repeated, again).items():
                lane.log(f"{name}: NaN or Inf from the initial state too")
                self._reset(lane, "non-finite")
            outputs.update(repeated)
        return outputs

    def _due(self, inputs: Collection[Lane]) -> list[Lane]:
        """Streams whose states are looked at after this step: now and then, and before a snapshot."""
        if self.snapshots is not None and self.snapshots.due(self._count + 1):
            return [lane for lane in self.lanes if not self._shared or lane in self._slots]
        return [lane for lane in inputs if (lane.frames + 1) % STATES_EVERY == 0]

    def _spoilt(self, outputs: dict[Lane, Arrays], and_states: Collection[Lane]) -> dict[Lane, str]:
        """Streams with NaN or Inf that care, each with the name of an output or a state that has it."""
        found = {lane: name for lane, results in outputs.items() if lane.guarded and (name := non_finite(results))}
        if any(lane.guarded and lane not in found for lane in and_states):
            rows = non_finite_rows(self.loop.contract, self.loop.state())
            for lane in and_states:
                name = rows.get(self._slots[lane].index if self._shared else 0)
                if lane.guarded and name is not None:
                    found.setdefault(lane, name)
        return found

    def save(self, snapshots: SnapshotWriter) -> None:
        """Write what all streams remember."""
        frames = {lane.name: lane.number for lane in self.lanes if lane in self._slots}
        snapshots.save(self.loop, self._count, frames if self._shared else None)

    def fail(self, lane: Lane, error: StepcellError) -> None:
        """End one stream; the others go on."""
        lane.end("error", error)
        if self._shared:  # of one stream the caller hears at once
            logger.warning(f"stream ended: {blame(lane.name, error)}")
        if lane in self._slots:
            self.loop.detach(self._slots.pop(lane))

    def end(self, stopped: Stopped, failure: StepcellError | None = None) -> None:
        """End what still runs."""
        for lane in self.lanes:
            lane.end(stopped, failure)


class _Failing:
    """`with _Failing(run, lane): ...`: an error in the block ends that stream only."""

    def __init__(self, run: Scheduler, lane: Lane) -> None:
        self._run, self._lane = run, lane

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, StepcellError) or isinstance(error, DeviceError):
            return False  # a device that fails does so for every stream
        self._run.fail(self._lane, error)
        return True
