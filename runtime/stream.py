"""A stream through a step loop: read, scale, step, unscale, write; and a report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, OutputError, StepcellError
from stepcell.runtime.frames import FrameAdapter, image_input, is_image, to_pixels
from stepcell.runtime.loop import StepLoop
from stepcell.runtime.sinks import Sink
from stepcell.runtime.sources import Source
from stepcell.runtime.statistics import Latency, LatencySummary, Stopwatch
from stepcell.runtime.stop import StopRequest

__all__ = ["RunReport", "StreamError", "run_stream"]

Stopped = Literal["end of input", "limit", "interrupted", "error"]


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did; `docs/run.md` explains the fields.

    Attributes:
        frames: frames stepped, and written where there is an output.
        seconds: wall time from the first read to the closed output.
        frames_per_second: frames by seconds, everything included.
        step, decode, convert, encode: time per frame in `StepLoop.step`, in reading, in scaling
            both ways, in writing. Each keeps its first one apart.
    """

    model: str
    backend: str
    device: str
    input: str
    output: str | None
    output_tensor: str | None
    frame_size: tuple[int, int] | None  # width, height
    frames: int
    resets: int
    stopped: Stopped
    error: str | None
    seconds: float
    frames_per_second: float
    step: LatencySummary
    decode: LatencySummary
    convert: LatencySummary
    encode: LatencySummary


class StreamError(StepcellError):
    """A stream that broke half-way: the cause's message and exit code, and the report so far."""

    def __init__(self, cause: StepcellError, report: RunReport) -> None:
        kept = f" ({report.output} holds the {report.frames} frames before it)"
        whole = report.frames > 0 and report.output is not None and not isinstance(cause, OutputError)
        super().__init__(cause.message + (kept if whole else ""), hint=cause.hint)
        self.exit_code = cause.exit_code
        self.report = report


def run_stream(
    loop: StepLoop,
    source: Source,
    sink: Sink | None = None,
    *,
    reset_every: int | None = None,
    limit: int | None = None,
    stop: StopRequest | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> RunReport:
    """Step every frame of `source` and write the results to `sink`, which is closed at the end.

    However the stream ends, what was written is finished as a valid file and kept; where nothing
    was written, a file that was there before is left alone.

    Args:
        loop: a model with one picture input; it is reset and its statistics start anew.
        source: frames; closed at the end.
        sink: None: the frames are only stepped.
        reset_every: forget before every this many frames.
        limit: stop after this many frames.
        stop: asked before every frame; a stopped run returns its report.
        on_frame: called with the number of frames done after each.

    Raises:
        StreamError: a frame could not be read, stepped or written; with the report so far.
        KeyboardInterrupt: ctrl-C where `stop` did not listen; the sink is closed all the same.
    """
    run = _Run(loop, source, sink, stop or StopRequest())
    stopped: Stopped = "error"
    failure: StepcellError | None = None
    try:
        stopped = run.frames(reset_every, limit, on_frame)
    except StepcellError as error:
        failure = error
    except KeyboardInterrupt:
        if run.stop.signal is None:
            raise
        stopped = "interrupted"
    finally:
        source.close()
        failure = run.finish_sink(failure)
    report = run.report("error" if failure else stopped, failure)
    if failure is not None:
        raise StreamError(failure, report) from failure
    return report


class _Run:
    """The counters of one run."""

    def __init__(self, loop: StepLoop, source: Source, sink: Sink | None, stop: StopRequest) -> None:
        self.loop, self.source, self.sink, self.stop = loop, source, sink, stop
        self.decode, self.convert, self.encode = Latency(), Latency(), Latency()
        self.count = 0
        self.resets = 0
        self.output: TensorSpec | None = None
        self.adapter: FrameAdapter | None = None
        self.started = time.perf_counter()

    def frames(self, reset_every: int | None, limit: int | None, on_frame: Callable[[int], None] | None) -> Stopped:
        spec = image_input(self.loop.contract)
        self.output = _choose_output(self.loop.contract, self.sink) if self.sink else None
        self.loop.reset()
        self.loop.statistics = Latency()
        frames = iter(self.source)
        while limit is None or self.count < limit:
            if self.stop.signal is not None:
                return "interrupted"
            frame = self._read(frames)
            if frame is None:
                if self.count == 0:
                    raise InputError(f"{self.source.name}: holds no frame")
                return "end of input"
            if reset_every is not None and self.count and self.count % reset_every == 0:
                self.loop.reset()
                self.resets += 1
            self._step(spec, frame)
            self.count += 1
            if on_frame is not None:
                on_frame(self.count)
        return "limit"

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

    def _step(self, spec: TensorSpec, frame: NDArray[Any]) -> None:
        started = time.perf_counter()
        if self.adapter is None:
            self.adapter = FrameAdapter(spec, frame)
        tensor = self.adapter.to_input(frame)
        seconds = time.perf_counter() - started
        outputs = self.loop.step(**{spec.name: tensor})
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
            result = to_pixels(self.output, result)
        self.convert.add(seconds + time.perf_counter() - started)
        with Stopwatch(self.encode):
            self.sink.write(result)

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
            frames=self.count,
            resets=self.resets,
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
