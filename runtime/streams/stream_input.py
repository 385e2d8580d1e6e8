"""Stream input: frames of one stream on their way from its source; two threads read and convert them."""

from __future__ import annotations

import threading

from stepcell.contract import TensorSpec
from stepcell.runtime.media.source import BadEventCounts, Source
from stepcell.runtime.streams.deadline import Deadline, LateFrames
from stepcell.runtime.streams.frame_converter import ConvertedFrame, FrameConverter
from stepcell.runtime.streams.frame_reader import DEPTH, Frame, FrameReader
from stepcell.runtime.streams.reconnect import Reconnect
from stepcell.runtime.streams.report import Dropped
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["StreamInput"]


class StreamInput:
    """The input of a stream.

    Args:
        source: read and closed by the thread of its frame reader. None: not opened yet, `reconnect` keeps trying.
        name: for messages.
        start: frames of a source that is not live before this one are passed on without a tensor.
        deadline: deadline of the frames of a live source; other frames are never late.
        reconnect: how a lost source is reopened; None: it ends.

    Attributes:
        live: whether the source is.
        length: frames of the source; None: not known.
        late: counts late frames.
        reader, converter: the threads; None: not started.
    """

    def __init__(
        self, source: Source | None, name: str, *, start: int, deadline: Deadline | None, reconnect: Reconnect | None
    ) -> None:
        self.live: bool = source is None or source.live
        self.length: int | None = source.length if source else None
        self.late: LateFrames = LateFrames(deadline if self.live else None)
        self.reader: FrameReader | None = None
        self.converter: FrameConverter | None = None
        self._source, self._name, self._reconnect = source, name, reconnect
        self._first = 0 if self.live else start

    def begin(self, changed: threading.Condition, spec: TensorSpec, *, ahead: int, check_finite: bool) -> None:
        """Start the threads.

        Args:
            changed: notified when `ready` may have changed.
            spec: input of the model.
            ahead: how many frames are converted before they are taken.
            check_finite: check the tensors for NaN and Inf.
        """
        self.reader = FrameReader(
            self._source,
            changed,
            name=self._name,
            drop_oldest=self.late.drop_oldest,
            depth=DEPTH - ahead,
            reconnect=self._reconnect,
        )
        self.converter = FrameConverter(
            self.reader, changed, spec, depth=ahead, unused=self._is_unused, check_finite=check_finite
        )

    def _is_unused(self, frame: Frame) -> bool:
        """Whether a frame will not be stepped, called by the thread of the converter."""
        return frame.number < self._first or self.late.is_lost(frame)

    @property
    def ready(self) -> bool:
        """Whether `take` returns a frame."""
        return self.converter is not None and self.converter.ready

    @property
    def ended(self) -> bool:
        """Whether no frame is left or will come; `take` then raises the error that ended the source, if any."""
        return self.converter is not None and self.converter.ended

    @property
    def expected(self) -> bool:
        """Whether a frame is being converted, or can be read at any time."""
        return not self.live or self.queued > 0

    def take(self) -> ConvertedFrame | None:
        """Remove and return the next frame; None: none is ready.

        Raises:
            InputError: the source failed after the last frame.
        """
        return self.converter.take() if self.converter is not None else None

    def release(self, converted: ConvertedFrame) -> None:
        """The tensor of this frame is not needed any more."""
        if self.converter is not None:
            self.converter.release(converted)

    def stop(self) -> None:
        """End the threads. Returns at once."""
        if self.reader is not None:
            self.reader.stop()
        if self.converter is not None:
            self.converter.stop()

    def close(self, control: RunControl) -> None:
        """Wait for the end of the threads, unless the run is aborted."""
        if self.reader is None and self._source is not None:  # it never began
            self._source.close()
        elif self.reader is not None and not control.aborting:
            self.reader.join()
            if self.converter is not None:
                self.converter.join()

    @property
    def queued(self) -> int:
        """Frames that were decoded and not taken."""
        return self.converter.queued if self.converter else 0

    @property
    def dropped(self) -> Dropped:
        """Frames that were not stepped, by reason."""
        return {"late": self.late.dropped, "queue full": self.reader.dropped if self.reader else 0}

    @property
    def reconnects(self) -> int:
        """Number of times the source was lost and reopened."""
        return self.reader.reconnects if self.reader else 0

    @property
    def bad_events(self) -> BadEventCounts:
        """Bad events of the source, by kind."""
        return self.reader.bad_events if self.reader else {}
