"""Progress of a run: live counters of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.media.source import BadEventCounts
from stepcell.runtime.streams.report import Dropped, Stopped
from stepcell.runtime.streams.reset_policy import Cause

__all__ = ["RunProgress", "StreamProgress"]


class StreamProgress(Protocol):
    """Counters of one stream, as in its report; may be read from any thread at any time."""

    @property
    def name(self) -> str:
        """Unique name of the stream."""
        ...

    @property
    def total(self) -> int | None:
        """Frames that the run will step; None: not known, as for a camera."""
        ...

    @property
    def frames(self) -> int: ...
    @property
    def late(self) -> int: ...
    @property
    def dropped(self) -> Dropped: ...
    @property
    def resets(self) -> dict[Cause, int]: ...
    @property
    def non_finite(self) -> int: ...
    @property
    def bad_events(self) -> BadEventCounts: ...
    @property
    def reconnects(self) -> int: ...
    @property
    def server_events(self) -> dict[str, int]: ...
    @property
    def queued(self) -> dict[str, int]:
        """Frames waiting to be stepped ("input") and to be written ("output")."""
        ...

    @property
    def running(self) -> bool: ...
    @property
    def stopped(self) -> Stopped | None:
        """Why the stream ended; None: it has not."""
        ...

    @property
    def seconds(self) -> float:
        """Time since the start, up to the end of the stream."""
        ...

    @property
    def latency(self) -> Latency:
        """From the arrival of a frame until its result was queued for the output."""
        ...


@dataclass(frozen=True)
class RunProgress:
    """Counters of a run.

    Attributes:
        streams: in the order of the inputs.
        step: time of a step of the batch.
    """

    streams: Sequence[StreamProgress]
    step: Latency
