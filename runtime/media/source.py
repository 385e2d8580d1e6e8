"""Source: the protocol of frame inputs."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from stepcell.display import displayed
from stepcell.runtime.media.colour import Colour

__all__ = ["FRAME_RATES", "BadEvent", "BadEventCounts", "Source", "display_name"]

BadEvent = Literal["outside", "back in time"]
BadEventCounts = dict[BadEvent, int]
FRAME_RATES = (Fraction(1, 1000), Fraction(1000))  # frames per second: lowest and highest that are accepted


class Source(Protocol):
    """An input of frames, iterated once.

    A frame is an array: pixels (H, W, C) uint8 with C = 3 (RGB) or 1 (grey), NV12 (H * 3 // 2, W) uint8 for a model
    that takes it, or a float tensor (C, H, W) that already has the values that the model takes. A frame that cannot be
    read raises InputError with its number.

    Attributes:
        name: as the user wrote it; "stdin" for `-`.
        fps: frames per second; None: not known.
        length: number of frames; None: not known.
        live: reopening it continues at the current time instead of at the first frame, as for a camera.
        has_sound: it has an audio track, which no output has unless it is copied.
        pixels: whether frames are pixels; None: not known before the first one.
        seconds: timestamp of the last frame on the clock of the source; None: its frames have none.
        pixel_aspect: width of a pixel by its height, known from the first frame on.
        colour: colour description, known from the first frame on; None: not stated.
        bad_events: events outside the sensor, or earlier than the one before, so far; empty for pictures.
    """

    name: str
    fps: Fraction | None = None
    length: int | None = None
    live: bool = False
    has_sound: bool = False
    pixels: bool | None = None
    seconds: float | None = None
    pixel_aspect: Fraction = Fraction(1)
    colour: Colour | None = None
    bad_events: Mapping[BadEvent, int] = MappingProxyType({})

    @abstractmethod
    def __iter__(self) -> Iterator[NDArray[Any]]: ...

    def interrupt(self) -> None:
        """End the iteration soon, even if it waits for a sender that is silent; called from any thread."""
        return

    def close(self) -> None:
        """Release the source; it is not read afterwards."""
        return


def display_name(text: str) -> str:
    """The name of an input or output for messages, metrics and reports.

    Secrets of a URL are replaced by asterisks; white space in it may be part of one. Control characters, and bytes of a
    file name that are not valid Unicode, which JSON cannot hold, are escaped.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        text = re.sub(r"\s", "%20", text)
    return displayed(text)
