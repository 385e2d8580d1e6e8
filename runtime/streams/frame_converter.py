"""Frame converter: converts the next frame of a stream to the input tensor of the model, in a background thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import TensorSpec
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.runtime.streams.frame_reader import Frame, FrameReader

__all__ = ["ConvertedFrame", "FrameConverter"]

JOIN_SECONDS = 1.0  # a conversion takes milliseconds


@dataclass(frozen=True)
class ConvertedFrame:
    """A frame and its tensor.

    Attributes:
        frame: as it was decoded.
        preprocessor: that converted it; None: it was not converted.
        tensor: the input of the model, until the frame is released; None: it was not converted.
        finite: whether the tensor was checked and holds neither NaN nor Inf.
        seconds: time that the conversion took.
        error: why it could not be converted.
    """

    frame: Frame
    preprocessor: Preprocessor | None = None
    tensor: NDArray[Any] | None = None
    finite: bool = False
    seconds: float = 0.0
    error: BaseException | None = None


class FrameConverter:
    """Takes the frames of a reader one by one, and holds one or two converted frames ready.

    So the next frame is converted while the current one is in its step, and a frame that the reader drops because its
    queue is full is never converted.

    Args:
        reader: whose frames are taken by this object only; not stopped by it.
        changed: the condition of the reader; notified when a frame is ready.
        spec: input of the model.
        depth: how many frames are held ready.
        unused: whether a frame will not be stepped, so that it is passed on without a tensor.
        check_finite: check the tensors for NaN and Inf.
    """

    def __init__(
        self,
        reader: FrameReader,
        changed: threading.Condition,
        spec: TensorSpec,
        *,
        depth: int = 1,
        unused: Callable[[Frame], bool] = lambda _: False,
        check_finite: bool = True,
    ) -> None:
        self._reader, self._changed, self._spec, self._depth = reader, changed, spec, depth
        self._unused, self._check_finite = unused, check_finite
        self._preprocessor: Preprocessor | None = None
        self._free: list[NDArray[Any]] = []  # tensors of the preprocessor that no frame uses
        self._queue: deque[ConvertedFrame] = deque()
        self._converting = self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"convert {reader.name}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether `take` returns a frame."""
        return bool(self._queue)

    @property
    def queued(self) -> int:
        """Frames that were decoded and not taken."""
        with self._changed:
            return self._reader.queued + self._converting + len(self._queue)

    @property
    def ended(self) -> bool:
        """Whether no frame is left or will come; `take` then raises the error that ended the source, if any."""
        with self._changed:
            return not self._converting and not self._queue and self._reader.ended

    def take(self) -> ConvertedFrame | None:
        """Remove and return the next frame; None: none is ready.

        Raises:
            InputError: the source failed after the last frame. Other errors of the source are raised as they are.
        """
        with self._changed:
            if self._queue:
                converted = self._queue.popleft()
                self._changed.notify_all()
                return converted
            if self.ended:
                self._reader.take()
        return None

    def release(self, converted: ConvertedFrame) -> None:
        """The tensor of this frame is not needed any more: a later frame may overwrite it."""
        tensor, current = converted.tensor, converted.preprocessor is self._preprocessor
        if tensor is not None and current and tensor.base is None:  # otherwise it is a view of the frame
            self._free.append(tensor)

    def stop(self) -> None:
        """End the thread after the frame that it converts. Returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of the thread, after `stop`."""
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        while (frame := self._next()) is not None:
            converted = self._convert(frame)
            with self._changed:
                self._queue.append(converted)
                self._converting = False
                self._changed.notify_all()

    def _next(self) -> Frame | None:
        """Wait for a frame, and for room to hold it; None: stopped."""
        with self._changed:
            while not self._stopping and (len(self._queue) >= self._depth or not self._reader.queued):
                self._changed.wait()
            if self._stopping:
                return None
            self._converting = True
            return self._reader.take()

    def _convert(self, frame: Frame) -> ConvertedFrame:
        if self._unused(frame):
            return ConvertedFrame(frame)
        started = time.perf_counter()
        try:
            preprocessor = self._preprocessor
            if preprocessor is None or frame.array.shape != preprocessor.shape:
                preprocessor = Preprocessor(self._spec, frame.array)
                self._preprocessor, self._free = preprocessor, []
            tensor = preprocessor(frame.array, self._free.pop() if self._free else None)
            finite = self._check_finite and (preprocessor.always_finite or bool(np.isfinite(tensor).all()))
        except BaseException as error:  # raised by the stream, in the thread that steps
            return ConvertedFrame(frame, error=error)
        return ConvertedFrame(frame, preprocessor, tensor, finite, time.perf_counter() - started)
