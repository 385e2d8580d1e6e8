"""EventSource: an event file as a source of input tensors, one per window."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import InputError, StepcellError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events.bad_events import BadEvents, OnBadEvent
from stepcell.runtime.media.events.formats import open_events
from stepcell.runtime.media.events.reader import require_size, validated
from stepcell.runtime.media.events.tensor import event_tensor
from stepcell.runtime.media.events.windows import split_windows
from stepcell.runtime.media.source import BadEvent, Source

__all__ = ["EventSource", "frame_rate"]

logger = logging.getLogger(__name__)

_LOOKED_AT, _SPARSE = 100, 0.9  # so many of the first windows empty: the times may have another unit
SHORTEST, LONGEST = 1000, 10**9  # window in us that gives a valid frame rate: 1000 to 0.001 frames per second


def frame_rate(window: EventWindow) -> Fraction | None:
    """Windows a second; None: they have no fixed time, or one that no video has."""
    by_time = window.unit == "us" and SHORTEST <= window.size <= LONGEST
    return Fraction(1_000_000, round(window.size)) if by_time else None


class EventSource(Source):
    """The windows of an event file, each as a tensor (C, H, W) float32.

    `fps` is known if windows have a fixed time of 1 ms to 1000 s.

    Args:
        path: an event file, as of `open_events`.
        spec: encoding of the tensor, and the window.
        size: (width, height) of the sensor in pixels, if the file does not say.
        on_bad_event: what to do with events outside the sensor or earlier than the one before, as of `BadEvents`.
        stream: which of several streams of events of a file.

    Raises:
        UsageError: the size of its sensor is not known.
        InputError: the file cannot be read, or the size of its sensor differs from `size`.
    """

    pixels: bool | None = False

    def __init__(
        self,
        path: Path,
        spec: EventSpec,
        size: tuple[int, int] | None = None,
        *,
        on_bad_event: OnBadEvent = "stop",
        stream: str | None = None,
    ) -> None:
        self.name: str = str(path)
        self.seconds: float | None = None
        self._spec = spec
        self._reader = open_events(path, stream)
        try:
            self.size: tuple[int, int] = require_size(self._reader, size)
        except StepcellError:
            self.close()
            raise
        self._bad = BadEvents(self.name, self.size, on_bad_event)
        self.fps: Fraction | None = frame_rate(spec.window)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        width, height = self.size
        number = sparse = 0
        for events, end in split_windows(validated(self._reader, self._bad), self._spec.window, width * height):
            self.seconds = end / 1e6
            number, sparse = number + 1, sparse + (not len(events))
            if number == _LOOKED_AT and sparse > _SPARSE * number:
                self._say_sparse(sparse)
            yield event_tensor(events, self._spec, height, width)
        if not number:
            raise InputError(
                f"{self.name}: holds fewer events than one window of {self._spec.window}",
                hint="choose a smaller window with --event-window",
            )

    def _say_sparse(self, empty: int) -> None:
        logger.warning(
            f"{self.name}: {empty} of the first {_LOOKED_AT} windows of {self._spec.window} hold no event: are its "
            "times in another unit? Integers are read as microseconds, floats as seconds (docs/events.md)"
        )

    @property
    def bad_events(self) -> Mapping[BadEvent, int]:  # type: ignore[override]  # a property stands for the attribute
        """Bad events so far, by kind."""
        return self._bad.counts

    def close(self) -> None:
        self._reader.close()
