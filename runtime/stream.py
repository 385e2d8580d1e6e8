"""A stream through a step loop: read, scale, step, unscale, write; and a report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.console import log
from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, OutputError, StepcellError
from stepcell.runtime.frames import FrameAdapter, image_input, is_image, to_pixels
from stepcell.runtime.loop import StepLoop
from stepcell.runtime.policies import STATES_EVERY, Cause, ResetPolicy, ResetWatch, non_finite, non_finite_rows
from stepcell.runtime.report import RunReport, Stopped, StreamError
from stepcell.runtime.saving import SnapshotWriter
from stepcell.runtime.sinks import Sink
from stepcell.runtime.sources import Source
from stepcell.runtime.statistics import Latency, Stopwatch
from stepcell.runtime.stop import StopRequest

__all__ = ["run_stream"]


def run_stream(
    loop: StepLoop,
    source: Source,
    sink: Sink | None = None,
    *,
    resets: ResetWatch | None = None,
    snapshots: SnapshotWriter | None = None,
    start: int = 0,
    limit: int | None = None,
    stop: StopRequest | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> RunReport:
    """Step every frame of `source` and write the results to `sink`, which is closed at the end.

    However the stream ends, what was written is finished as a valid file and kept; where nothing
    was written, a file that was there before is left alone. A snapshot that cannot be written is
    logged and counted, and the stream goes on.

    Args:
        loop: a model with one picture input; its statistics start anew.
        source: frames; closed at the end.
        sink: None: the frames are only stepped.
        resets: says when to forget; by default only NaN and Inf are looked for, and end the stream.
        snapshots: writes the states now and then, and when the stream has ended without an error.
        start: frames of this stream that `loop` has stepped already: it keeps its states, and a
            source that starts from its beginning is read up to there. 0: the loop is reset.
        limit: stop after this many frames.
        stop: asked before every frame; a stopped run returns its report.
        on_frame: called with the number of frames done after each.

    Raises:
        StreamError: a frame could not be read, stepped or written; with the report so far.
        KeyboardInterrupt: ctrl-C where `stop` did not listen; the sink is closed all the same.
    """
    run = _Run(loop, source, sink, resets or ResetWatch(ResetPolicy()), snapshots, start, stop or StopRequest())
    stopped: Stopped = "error"
    failure: StepcellError | None = None
    try:
        stopped = run.frames(limit, on_frame)
    except StepcellError as error:
        failure = error
    except KeyboardInterrupt:
        if run.stop.signal is None:
            raise
        stopped = "interrupted"
    finally:
        source.close()
        failure = run.finish_sink(failure)
    if failure is None and snapshots is not None and run.count and run.between_frames:
        snapshots.save(loop, run.number)
    report = run.report("error" if failure else stopped, failure)
    if failure is not None:
        raise StreamError(failure, report) from failure
    return report


class _Run:
    """The counters of one run."""

    def __init__(
        self,
        loop: StepLoop,
        source: Source,
        sink: Sink | None,
        resets: ResetWatch,
        snapshots: SnapshotWriter | None,
        start: int,
        stop: StopRequest,
    ) -> None:
        self.loop, self.source, self.sink, self.stop = loop, source, sink, stop
        self.resets, self.snapshots, self.start = resets, snapshots, start
        self.decode, self.convert, self.encode = Latency(), Latency(), Latency()
        self.count = 0
        self.between_frames = True  # else a second ctrl-C came, and nobody knows whether the states are new
        self.output: TensorSpec | None = None
        self.adapter: FrameAdapter | None = None
        self.started = time.perf_counter()

    @property
    def number(self) -> int:
        """Of the frame at hand, in its stream."""
        return self.start + self.count

    def frames(self, limit: int | None, on_frame: Callable[[int], None] | None) -> Stopped:
        spec = image_input(self.loop.contract)
        self.output = _choose_output(self.loop.contract, self.sink) if self.sink else None
        if self.start == 0:
            self.loop.reset()
        self.loop.statistics = Latency()
        frames = iter(self.source)
        if not self.source.live:
            self._skip(frames)
        while limit is None or self.count < limit:
            if self.stop.signal is not None:
                return "interrupted"
            frame = self._read(frames)
            if frame is None:
                if self.number == 0:
                    raise InputError(f"{self.source.name}: holds no frame")
                return "end of input"
            cause = self.resets.due(self.number, frame, self.source.seconds)
            if cause is not None and self.number:
                self._reset(cause)
            self.between_frames = False
            self._step(spec, frame)
            self.count += 1
            self.between_frames = True
            if self.snapshots is not None and self.snapshots.due(self.number):
                self.snapshots.save(self.loop, self.number)
            if on_frame is not None:
                on_frame(self.count)
        return "limit"

    def _skip(self, frames: Iterator[NDArray[Any]]) -> None:
        """Read what was stepped before; the policies see it, so that they go on where they were."""
        for number in range(self.start):
            frame = None if self.stop.signal is not None else self._read(frames)
            if frame is not None:
                self.resets.due(number, frame, self.source.seconds)
            elif self.stop.signal is None:
                raise InputError(
                    f"{self.source.name}: ends at frame {number}, before frame {self.start} to go on from",
                    hint="was the snapshot taken of another input?",
                )
        self.decode = Latency()

    def _read(self, frames: Iterator[NDArray[Any]]) -> NDArray[Any] | None:
        started = time.perf_counter()
        self.stop.waiting = True
        try:
            frame = next(frames, None)
        finally:
            self.stop.waiting = False
        if frame is not None:
            self.decode.add(time.perf_counter() - started)
        return frame

    def _reset(self, cause: Cause) -> None:
        self.loop.reset([True] if self.count or cause == "non-finite" else None)
        self.resets.counts[cause] += 1
        if cause != "every":
            log(f"frame {self.number}: states reset ({cause})")

    def _step(self, spec: TensorSpec, frame: NDArray[Any]) -> None:
        started = time.perf_counter()
        if self.adapter is None:
            self.adapter = FrameAdapter(spec, frame)
        tensor = self.adapter.to_input(frame)
        seconds = time.perf_counter() - started
        outputs = self._guarded_step({spec.name: tensor})
        if self.sink is None or self.output is None:
            self.convert.add(seconds)
            return
        started = time.perf_counter()
        result = outputs[self.output.name]
        if is_image(self.output):
            result = self.adapter.crop(result)
        elif result.ndim and len(result) == 1:
            result = result[0]  # the batch of one stream
        if self.sink.takes_pixels:
            if self.resets.policy.on_nonfinite == "reset":
                # What is left has been logged, and a picture has no NaN.
                result = np.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0)
            result = to_pixels(self.output, result)
        self.convert.add(seconds + time.perf_counter() - started)
        with Stopwatch(self.encode):
            self.sink.write(result)

    def _guarded_step(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """A step, and a second one from the initial state where the first returns NaN or Inf."""
        outputs, policy = self.loop.step(**inputs), self.resets.policy.on_nonfinite
        if policy == "ignore":
            return outputs
        due = (self.count + 1) % STATES_EVERY == 0
        due = due or (self.snapshots is not None and self.snapshots.due(self.number + 1))
        spoilt = self._non_finite(outputs, and_states=due)
        if spoilt is None:
            return outputs
        if policy == "stop":
            raise StepcellError(
                f"frame {self.number}: {spoilt}: the model returned NaN or Inf",
                hint="--on-nonfinite reset goes on from the initial state; float16 models overflow beyond 65504",
            )
        log(f"frame {self.number}: {spoilt}: the model returned NaN or Inf")
        self._reset("non-finite")
        outputs = self.loop.step(**inputs)
        spoilt = self._non_finite(outputs, and_states=True)
        if spoilt is not None:
            log(f"frame {self.number}: {spoilt}: NaN or Inf from the initial state too")
            self._reset("non-finite")
        return outputs

    def _non_finite(self, outputs: dict[str, NDArray[Any]], *, and_states: bool) -> str | None:
        found = non_finite(outputs)
        if found is None and and_states:
            found = next(iter(non_finite_rows(self.loop.contract, self.loop.state()).values()), None)
        return found

    def finish_sink(self, failure: StepcellError | None) -> StepcellError | None:
        """Keep what was written, unless it was the writing that failed."""
        if self.sink is None:
            return failure
        if self.count == 0 or isinstance(failure, OutputError):
            self.sink.abandon()
            return failure
        try:
            self.sink.close()
        except OutputError as error:
            self.sink.abandon()
            return failure or error
        return failure

    def report(self, stopped: Stopped, failure: StepcellError | None) -> RunReport:
        seconds = time.perf_counter() - self.started
        return RunReport(
            model=self.loop.name,
            backend=self.loop.description,
            device=self.loop.device,
            input=self.source.name,
            output=self.sink.name if self.sink else None,
            output_tensor=self.output.name if self.output else None,
            frame_size=(self.adapter.size[1], self.adapter.size[0]) if self.adapter else None,
            first_frame=self.start,
            frames=self.count,
            resets=self.resets.counts,
            snapshots=self.snapshots.written if self.snapshots else 0,
            failed_snapshots=self.snapshots.failed if self.snapshots else 0,
            stopped=stopped,
            error=failure.message if failure else None,
            seconds=round(seconds, 3),
            frames_per_second=round(self.count / seconds, 2),
            step=self.loop.statistics.summary(),
            decode=self.decode.summary(),
            convert=self.convert.summary(),
            encode=self.encode.summary(),
        )


def _choose_output(contract: StepContract, sink: Sink) -> TensorSpec:
    """The first picture; for an array, the first output where none is a picture."""
    pictures = [spec for spec in contract.outputs if is_image(spec)]
    if pictures:
        return pictures[0]
    if sink.takes_pixels or not contract.outputs:
        names = ", ".join(f"{spec.name} {spec.shape}" for spec in contract.outputs)
        raise OutputError(
            f"{sink.name}: no output of this model is a picture (layout NCHW, 1 or 3 channels): {names or 'none'}",
            hint="--output out.npy takes the model's own numbers",
        )
    return contract.outputs[0]
