"""Deadline of live frames: decides which frames are late, and whether these are dropped or stepped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from stepcell.runtime.streams.frame_reader import Frame

__all__ = ["Deadline", "LateFrames", "OnLate"]

OnLate = Literal["drop", "block"]


@dataclass(frozen=True)
class Deadline:
    """Largest age of a frame of a live source when its step begins.

    Attributes:
        seconds: since the frame was decoded.
        on_late: "drop": a late frame is not stepped, and a full queue drops its oldest frame. "block": a late frame
            is stepped and counted, and a full queue blocks the source.
    """

    seconds: float
    on_late: OnLate = "drop"


class LateFrames:
    """Applies a deadline to the frames of one stream, and counts those that are late.

    Args:
        deadline: None: no frame is late.

    Attributes:
        stepped: late frames that were stepped.
        dropped: late frames that were not.
    """

    def __init__(self, deadline: Deadline | None) -> None:
        self._deadline = deadline
        self.stepped: int = 0
        self.dropped: int = 0

    @property
    def drop_oldest(self) -> bool:
        """Whether a full queue of the frame reader drops its oldest frame instead of blocking the source."""
        return self._deadline is not None and self._deadline.on_late == "drop"

    def is_lost(self, frame: Frame) -> bool:
        """Whether `drop` will drop this frame, whenever it is called: it is late already."""
        return self.drop_oldest and self._is_late(frame)

    def drop(self, frame: Frame) -> bool:
        """Whether to drop this frame; call exactly once per frame, immediately before its step."""
        if not self._is_late(frame):
            return False
        if not self.drop_oldest:
            self.stepped += 1
            return False
        self.dropped += 1
        return True

    def _is_late(self, frame: Frame) -> bool:
        return self._deadline is not None and time.monotonic() - frame.arrived > self._deadline.seconds
