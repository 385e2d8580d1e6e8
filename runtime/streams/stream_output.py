"""Stream output: results of one stream on their way to its sink; a thread converts and writes them."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import StepcellError
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.media.postprocess import NonFinitePixels, OutputPostprocessor
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.runtime.media.sink import Sink
from stepcell.runtime.media.source import display_name
from stepcell.runtime.streams.frame_converter import ConvertedFrame
from stepcell.runtime.streams.frame_writer import FrameWriter
from stepcell.runtime.streams.non_finite import OnNonFinite
from stepcell.runtime.streams.output_clock import OutputClock
from stepcell.runtime.streams.report import append_message
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["StreamOutput"]

# "reset": NaN was logged, and a picture cannot show it. "stop": it ended the stream.
_NON_FINITE: dict[OnNonFinite, NonFinitePixels] = {"reset": "replace", "ignore": "error", "stop": "checked"}


class _Result(NamedTuple):
    """What the frame writer gets: the output of a frame, its preprocessor, and the time that this took."""

    tensor: NDArray[Any]
    preprocessor: Preprocessor
    seconds: float


class StreamOutput:
    """The output of a stream, or none: frames are only stepped then.

    Args:
        sink: written and closed by the thread of its frame writer.
        clock: timestamps of the output.

    Attributes:
        convert: time per frame before and after its step, as in the report.
        tensor: name of the output of the model that is written; None: it has not begun, or there is no sink.
    """

    def __init__(self, sink: Sink | None, clock: OutputClock) -> None:
        self.sink: Sink | None = sink
        self.convert: Latency = Latency()
        self.tensor: str | None = None
        self._clock = clock
        self._writer: FrameWriter | None = None
        self._postprocessor: OutputPostprocessor | None = None

    def begin(self, contract: StepContract, changed: threading.Condition, on_nonfinite: OnNonFinite) -> None:
        """Start the thread.

        Args:
            contract: contract of the model.
            changed: notified when `room` or `failed` may have changed.
            on_nonfinite: of the stream.

        Raises:
            OutputError: the model has no output that the sink takes.
        """
        if self.sink is not None:
            self._writer = FrameWriter(self.sink, changed, convert=self._postprocess)
            self._postprocessor = OutputPostprocessor(contract, self.sink, non_finite=_NON_FINITE[on_nonfinite])
            self.tensor = self._postprocessor.output.name

    @property
    def failed(self) -> bool:
        """Whether `check` raises an error."""
        return self._writer is not None and self._writer.failed

    def has_room(self, steps: int) -> bool:
        """Whether the results of one more step than these can be put without waiting, or the writer has failed."""
        return self._writer is None or self._writer.failed or self._writer.room > steps

    def check(self) -> None:
        """Raise the OutputError of a result that could not be written."""
        if self._writer is not None:
            self._writer.check()

    def put(self, outputs: dict[str, NDArray[Any]], converted: ConvertedFrame) -> None:
        """Queue the result of a frame.

        Raises:
            StepcellError: the sink takes pixels, and the result holds NaN or Inf or a label that is no byte.
            OutputError: an earlier result could not be written.
        """
        started = time.perf_counter()
        if self._writer is None or self._postprocessor is None:
            self.convert.add(converted.seconds)
            return
        assert converted.preprocessor is not None
        result = outputs[self._postprocessor.output.name]
        self._postprocessor.check(result, converted.preprocessor)
        spent = converted.seconds + time.perf_counter() - started
        self._writer.put(_Result(result, converted.preprocessor, spent), self._clock.seconds(converted.frame))

    def _postprocess(self, result: _Result) -> NDArray[Any]:
        """The frame for the sink, called by the thread of the writer."""
        assert self._postprocessor is not None
        started = time.perf_counter()
        frame = self._postprocessor(result.tensor, result.preprocessor)
        self.convert.add(result.seconds + time.perf_counter() - started)
        return frame

    def drain(self, control: RunControl) -> None:
        """Wait until everything that was put is written, as `FrameWriter.drain` does."""
        if self._writer is not None:
            self._writer.drain(control)

    def end(self, *, keep: bool) -> None:
        """Finish the output, or abandon it: an older file stays then. Returns at once."""
        if self._writer is not None and keep:
            self._writer.finish()
        elif self._writer is not None:
            self._writer.abandon()

    def close(self, control: RunControl) -> float:
        """Wait for the end of the thread; returns when the sink was closed, by `time.perf_counter`, or 0.

        Raises:
            OutputError, DeviceError: it could not be finished.
        """
        if self._writer is not None:
            self._writer.join(control)
            return self._writer.closed or 0.0
        if self.sink is not None:
            self.sink.abandon()
        return 0.0

    @property
    def written(self) -> int | None:
        """Frames in the output once it is closed, before that 0; None: no output."""
        if self.sink is None:
            return None
        return self._writer.written if self._writer is not None and self._writer.closed is not None else 0

    def holds(self, frames: int) -> bool | None:
        """Whether the output has this many frames, whatever happens to the process; None: it never will."""
        if self._writer is None or self._writer.whole >= frames:
            return True
        return None if self._writer.closed is not None else False

    @property
    def queued(self) -> int:
        """Frames that wait to be written."""
        return self._writer.queued if self._writer else 0

    @property
    def encode(self) -> Latency:
        """Time per frame in the sink."""
        return (self._writer.encode if self._writer else None) or Latency()

    @property
    def unfinished(self) -> str | None:
        """A message, if the thread did not end."""
        if self._writer is None or self._writer.closed is not None:
            return None
        return f"{display_name(self._writer.sink.name)}: not finished when the run was aborted"

    def with_frames(self, failure: StepcellError, stepped: int) -> StepcellError:
        """The error that ended the stream, with what the output holds of the frames that were stepped."""
        if self.sink is None or not self.written:
            return failure
        some = f"first {self.written} of {stepped} frames"
        held = f"{self.written} frames before it" if self.written == stepped else some
        older = ", in place of an older file" if self.sink.replaces else ""
        return append_message(failure, f" ({display_name(self.sink.name)} holds the {held}{older})")
