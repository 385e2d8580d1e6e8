"""Output clock: the timestamp of each result in its output."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Literal

from stepcell.errors import InputError
from stepcell.runtime.streams.frame_reader import Frame

__all__ = ["OutputClock", "Timestamps"]

logger = logging.getLogger(__name__)

Timestamps = Literal["keep", "constant"]
LONGEST_GAP = 3600.0  # seconds; .mp4 can hold half a day


class OutputClock:
    """Computes timestamps that increase, from those of the source or from the numbers of its frames.

    Args:
        fps: frames per second, of frames without a usable timestamp.
        keep: whether the timestamps of the source are kept. Otherwise frame N of the source is at N / fps: a dropped
            frame leaves a gap of its length.
        name: of the source, for messages.
        announce: log once that the timing of the source varies and is not kept.
    """

    def __init__(self, fps: Fraction, *, keep: bool, name: str, announce: bool = False) -> None:
        self._frame_seconds, self._keep, self._name, self._announce = float(1 / fps), keep, name, announce
        self._first: Frame | None = None
        self._last: Frame | None = None
        self._now = 0.0

    def seconds(self, frame: Frame) -> float:
        """Timestamp of the result of this frame; call once per frame, in order.

        Where timestamps are kept, it is on the clock of the source, but for steps back and gaps of more than an hour,
        which become one frame.

        Raises:
            InputError: timestamps are kept and the frame has none.
        """
        first, last, self._last = self._first, self._last, frame
        if self._keep and frame.seconds is None:
            raise InputError(
                f"{self._name}: frame {frame.number} has no timestamp to keep",
                hint="pictures and arrays have none: omit --timestamps keep",
            )
        if first is None or last is None:
            self._first = frame
            self._now = frame.seconds if self._keep and frame.seconds is not None else 0.0
        elif not self._keep:
            self._now = (frame.number - first.number) * self._frame_seconds
            self._announce_variation(frame, first)
        elif frame.seconds is not None and last.seconds is not None:
            step = frame.seconds - last.seconds
            if not 0 < step <= LONGEST_GAP:
                logger.warning(
                    f"{self._name}: frame {frame.number}: its timestamp is {step:+.3f} s from the last one: "
                    "the output goes on after one frame"
                )
                step = self._frame_seconds
            self._now += step
        return self._now

    def _announce_variation(self, frame: Frame, first: Frame) -> None:
        if not self._announce or frame.seconds is None or first.seconds is None:
            return
        off = abs(frame.seconds - first.seconds - self._now)
        if off > 1.5 * self._frame_seconds:
            self._announce = False
            logger.warning(
                f"{self._name}: frame {frame.number}: the timing varies; the output has constant "
                f"{1 / self._frame_seconds:.5g} frames per second: --timestamps keep keeps the timing"
            )
