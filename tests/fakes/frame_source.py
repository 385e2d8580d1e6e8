"""Source of frames that a test gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from stepcell.runtime.media.source import Source


class FrameSource(Source):
    """Yields frames, each after a pause; an exception among them is raised.

    Args:
        name: of the source.
        frames: arrays and exceptions.
        pause: seconds before each frame.
        live: as of a camera.
        times: timestamp of each frame; by default 25 frames per second.

    Attributes:
        read: frames yielded so far.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        name: str,
        frames: Sequence[Any],
        *,
        pause: float = 0.0,
        live: bool = False,
        times: Sequence[float] | None = None,
    ) -> None:
        self.name, self.live = name, live
        self._frames, self._pause, self._times = frames, pause, times
        self.read = 0
        self.closed = False

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for number, frame in enumerate(self._frames):
            if self._pause:
                time.sleep(self._pause)
            if isinstance(frame, BaseException):
                raise frame
            self.seconds = number / 25 if self._times is None else self._times[number]
            self.read += 1
            yield frame

    def close(self) -> None:
        self.closed = True
