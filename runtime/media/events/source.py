"""A file of events as a source of input tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.event_spec import EventSpec
from stepcell.runtime.media.events.dat import DatReader
from stepcell.runtime.media.events.events import LARGEST, EventReader, checked
from stepcell.runtime.media.events.npz import NpzReader
from stepcell.runtime.media.events.raw import RawReader
from stepcell.runtime.media.events.tensor import event_tensor
from stepcell.runtime.media.events.windows import windows

__all__ = ["EVENT_FILES", "EventSource", "open_events"]

_READERS: dict[str, Callable[[Path, BinaryIO], EventReader]] = {".dat": DatReader, ".raw": RawReader, ".npz": NpzReader}
EVENT_FILES = tuple(_READERS)
SHORTEST, LONGEST = 1000, 10**9  # us: a video has up to 1000 frames a second, and at least one in 1000 seconds


def open_events(path: Path) -> EventReader:
    """Open a file of events by its suffix.

    Raises:
        InputError: it cannot be read, or is not what its suffix says.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _READERS[path.suffix](path, file)
    except BaseException:
        file.close()
        raise


class EventSource:
    """Windows of a file, each as a tensor (C, H, W) float32.

    Args:
        path: .dat, .raw or .npz.
        spec: how tensors are made.
        size: width and height of the sensor, where the file does not say.

    `fps` is known where windows are by time, of 1 ms to 1000 s.

    Raises:
        InputError: the file cannot be read, or its sensor is unknown or not of `size`.
    """

    length: int | None = None
    live = False

    def __init__(self, path: Path, spec: EventSpec, size: tuple[int, int] | None = None) -> None:
        self.name = str(path)
        self.seconds: float | None = None
        self._spec = spec
        self._reader = open_events(path)
        own = self._reader.size
        if own is not None and size is not None and own != size:
            self.close()
            raise InputError(f"{path}: its sensor is {own[0]}x{own[1]}, --size says {size[0]}x{size[1]}")
        found = own or size
        if found is None or 0 in found:
            self.close()
            raise InputError(f"{path}: does not say how large its sensor is", hint="--size WIDTHxHEIGHT does")
        if max(found) > LARGEST:
            self.close()
            raise InputError(f"{path}: expected a sensor of at most {LARGEST} pixels a side, got {found[0]}x{found[1]}")
        self.size = found
        by_time = spec.window.unit == "us" and SHORTEST <= spec.window.size <= LONGEST
        self.fps: Fraction | None = Fraction(1_000_000, round(spec.window.size)) if by_time else None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        width, height = self.size
        empty = True
        for events, end in windows(checked(self._reader, self.size), self._spec.window, width * height):
            self.seconds = end / 1e6
            empty = False
            yield event_tensor(events, self._spec, height, width)
        if empty:
            raise InputError(
                f"{self.name}: holds fewer events than one window of {self._spec.window}",
                hint="--event-window takes a smaller one",
            )

    def close(self) -> None:
        self._reader.close()
