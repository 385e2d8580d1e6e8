"""Event tensors in the contract: how the events of an event camera become the input of a model (`TensorSpec.events`).

docs/events.md has the formulas.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from stepcell.errors import UsageError

__all__ = ["EventSpec", "EventWindow"]

_TEXT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(us|ms|s|events/pixel|events)")
_PUBLISHED = {"voxel_grid": "E2VID", "event_volume": "OpenEB", "histogram": "RVT"}  # whose bins they are
_MICROSECONDS = {"us": 1, "ms": 1000, "s": 1_000_000}


class EventWindow(msgspec.Struct, frozen=True, kw_only=True):
    """The events of one step.

    Attributes:
        size: in `unit`, above zero.
        unit: "us": a fixed time in microseconds; "events": a fixed number of events; "events/pixel": a fixed number per
            pixel of the sensor.
    """

    size: float
    unit: Literal["us", "events", "events/pixel"]

    @classmethod
    def parse(cls, text: str, *, subject: str = "window") -> EventWindow:
        """From `5000us`, `30ms`, `15000events` or `0.35events/pixel`.

        Raises:
            UsageError: any other text, or less than one event or microsecond.
        """
        match = _TEXT.fullmatch(text)
        if match is not None:
            size, unit = float(match[1]), match[2]
            if unit in _MICROSECONDS:
                size, unit = float(round(size * _MICROSECONDS[unit])), "us"
            if size > 0 and (unit == "events/pixel" or size == int(size)):
                return cls(size=size, unit=unit)  # type: ignore[arg-type]  # the pattern allows no other
        raise UsageError(
            f"{subject}: expected a time or a number of events, got {text!r}",
            hint="such as 5000us, 30ms, 15000events or 0.35events/pixel",
        )

    def count(self, pixels: int) -> int | None:
        """Number of events in a window, for a sensor with this number of pixels; None: the window is a time."""
        if self.unit == "us":
            return None
        return max(1, int(self.size * pixels if self.unit == "events/pixel" else self.size))

    def __str__(self) -> str:
        return f"{self.size:g} {self.unit}"


class EventSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The channels of an event tensor.

    Attributes:
        representation: "voxel_grid", "event_volume" or "histogram": how an event is distributed over the
            time bins (`stepcell.runtime.media.events.tensor`).
        bins: time bins from the first event of a window to its last.
        polarity: "signed": one channel per bin, where a falling event counts as -1; "split": the bins of the falling
            events, then those of the rising events, each counted as +1.
        window: the events of one step.
        normalise: shift and scale the non-zero values to mean 0 and standard deviation 1.
        convention: "tonic": the bins of tonic's voxel grid, for a model that was trained with it. Not given: those of
            the publication, which are E2VID's for a voxel grid.
    """

    representation: Literal["voxel_grid", "event_volume", "histogram"]
    bins: int
    polarity: Literal["signed", "split"] = "signed"
    window: EventWindow
    normalise: bool = False
    convention: Literal["tonic"] | msgspec.UnsetType = msgspec.UNSET  # left out of files, which older versions read

    @property
    def channels(self) -> int:
        """Number of channels of the tensor."""
        return self.bins * (2 if self.polarity == "split" else 1)

    def __str__(self) -> str:
        norm = ", normalised" if self.normalise else ""
        whose = "tonic" if self.convention else _PUBLISHED[self.representation]
        return f"{self.representation} of {self.bins} bins as of {whose}, {self.polarity}{norm}, {self.window} a step"
