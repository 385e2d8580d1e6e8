"""Stepping: the steps of a run, at most two under way, with the rules for NaN and Inf.

Where the back end overlaps steps, a second step is started before the results of the first one are looked at. If these
hold NaN or Inf, the second step has read states that are wrong for that stream: its part is thrown away, and the stream
is stepped again from the initial states. So the results are those of one step after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from stepcell.errors import StepcellError
from stepcell.runtime.backends.base import StepFuture
from stepcell.runtime.streams.non_finite import first_non_finite
from stepcell.runtime.streams.reset_policy import Cause
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.stepper import Arrays, Stepper
from stepcell.runtime.streams.stream import Stream
from stepcell.runtime.streams.watchdog import Watchdog

__all__ = ["Step", "StepTimes", "Stepping"]


class StepTimes(Protocol):
    """Receives the time of every step and frame, such as `Metrics`."""

    def step(self, seconds: float) -> None:
        """Time of a step of the batch."""

    def frame(self, stream: Stream, seconds: float) -> None:
        """Latency of a frame, from its arrival until its result was queued for the output."""


@dataclass(eq=False)
class Step:
    """A step that was started.

    Attributes:
        inputs: inputs of each stream.
        tainted: streams whose frame holds NaN or Inf: their states are reset after the step.
        outputs: waits for the outputs of each stream, or the error that ends it.
        frames: the number of the frame of each stream, for messages.
        started: by `time.perf_counter`.
    """

    inputs: dict[Stream, Arrays]
    tainted: Collection[Stream]
    outputs: StepFuture[Mapping[Stream, Arrays | StepcellError]]
    frames: str
    started: float

    def drop(self, stream: Stream) -> None:
        """The stream ended before this step."""
        self.inputs.pop(stream, None)


class Stepping:
    """Starts and finishes the steps of a run.

    Args:
        stepper: of the streams.
        isolated: context in which an error ends its stream only.
        control: given up by the watchdog.
        times: receives the time of every step.
    """

    def __init__(
        self,
        stepper: Stepper,
        isolated: Callable[[Stream], AbstractContextManager[None]],
        control: RunControl,
        times: StepTimes | None,
    ) -> None:
        self._stepper, self._isolated, self._times = stepper, isolated, times
        self._under_way: list[Step] = []
        self._watchdog = Watchdog(stepper.name, stepper.interrupt, control.give_up)

    def __enter__(self) -> Stepping:
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.close()

    def start(self, inputs: Mapping[Stream, Arrays], tainted: Collection[Stream] = ()) -> Step:
        """Start a step of these streams.

        Raises:
            StepcellError: it could not be started; a step before it is not affected.
        """
        ahead = bool(self._under_way)
        before = self._under_way[0].inputs if ahead else {}
        frames = ", ".join(f"{stream.name}: frame {stream.number + (stream in before)}" for stream in inputs)
        step = Step(dict(inputs), tainted, StepFuture(dict), frames, time.perf_counter())
        self._under_way.append(step)
        if not ahead:
            self._watchdog.begin(lambda: frames)
        try:
            step.outputs = self._stepper.start(inputs)
        except BaseException:
            if ahead:
                self._under_way.remove(step)
            else:
                self._watchdog.end()
            raise
        return step

    def _wait(self, step: Step) -> Mapping[Stream, Arrays | StepcellError]:
        """The outputs of a step; the first call ends it."""
        if step not in self._under_way:
            return step.outputs.result()
        try:
            outputs = step.outputs.result()
        finally:
            self._watchdog.end()
        self._under_way.remove(step)
        if self._under_way:
            frames = self._under_way[0].frames
            self._watchdog.begin(lambda: frames)
        if self._times is not None:
            self._times.step(time.perf_counter() - step.started)
        return outputs

    def _arrays(self, step: Step) -> dict[Stream, Arrays]:
        """Wait for a step, and end the streams that it could not step."""
        outputs, results = {}, self._wait(step)
        for stream in step.inputs:
            with self._isolated(stream):
                result = results[stream]
                if isinstance(result, StepcellError):
                    raise result
                outputs[stream] = result
        return outputs

    def reset(self, stream: Stream, cause: Cause) -> None:
        """Set the states of a stream to their initial values, after the steps that were started."""
        self._stepper.reset(stream, cause)
        stream.count_reset(cause)

    def finish(
        self, step: Step, name: str, states_of: Sequence[Stream], ahead: Step | None = None
    ) -> tuple[dict[Stream, Arrays], list[Stream]]:
        """Wait for a step, end the streams with NaN or Inf, or step them again, as their policy says.

        Args:
            step: the oldest step under way.
            name: input of the frames, for messages.
            states_of: streams whose states are checked too. None may be under way in a later step.
            ahead: the step after it, in which none of these streams had a reset.

        Returns:
            The outputs of each stream, and the streams of `ahead` that have to be stepped again (`repeat`).
        """
        outputs = self._arrays(step)
        for stream in [stream for stream in step.tainted if stream in outputs]:
            stream.non_finite += 1
            stream.log(f"{name}: NaN or Inf in the frame")
            self.reset(stream, "non-finite")
        again: dict[Stream, Arrays] = {}
        rest = {stream: arrays for stream, arrays in outputs.items() if stream not in step.tainted}
        found = self._non_finite(rest, states_of)
        if found and ahead is not None:
            self._wait(ahead)
        for stream, tensor in found.items():
            stream.non_finite += 1
            with self._isolated(stream):
                if stream.monitor.policy.on_nonfinite == "stop":
                    outputs.pop(stream, None)
                    raise StepcellError(
                        f"{stream.prefix}frame {stream.number}: {tensor}: the model returned NaN or Inf",
                        hint="--on-nonfinite reset continues from the initial states; "
                        "float16 models overflow beyond 65504",
                    )
                stream.log(f"{tensor}: the model returned NaN or Inf")
                self.reset(stream, "non-finite")
                if stream in step.inputs:
                    again[stream] = step.inputs[stream]
        if again:
            repeated = self._arrays(self.start(again))
            for stream in again:
                if stream not in repeated:
                    outputs.pop(stream, None)
            for stream, tensor in self._non_finite(repeated, list(repeated)).items():
                stream.log(f"{tensor}: NaN or Inf from the initial states too")
                self.reset(stream, "non-finite")
            outputs.update(repeated)
        return outputs, [stream for stream in again if ahead is not None and stream in ahead.inputs]

    def repeat(self, step: Step, streams: Sequence[Stream]) -> None:
        """Step these streams again, in place of their part of a step whose end was waited for."""
        inputs = {stream: step.inputs[stream] for stream in streams if stream in step.inputs}
        if not inputs:
            return
        first = self._wait(step)
        repeated = self._wait(self.start(inputs))
        step.outputs = StepFuture(lambda: {**first, **repeated})

    def abandon(self, step: Step) -> bool:
        """Wait for a step of streams that ended before it; returns whether it succeeded."""
        try:
            self._wait(step)
        except StepcellError:
            return False
        return True

    def _non_finite(self, outputs: dict[Stream, Arrays], states_of: Collection[Stream]) -> dict[Stream, str]:
        """Streams with NaN or Inf that are checked for it, each with the name of such an output or state."""
        found = {}
        for stream, results in outputs.items():
            if stream.checks_finite and (name := first_non_finite(results)):
                found[stream] = name
        unknown = [stream for stream in states_of if stream.checks_finite and stream not in found]
        return {**found, **(self._stepper.non_finite_states(unknown) if unknown else {})}
