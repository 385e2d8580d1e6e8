"""EventStream: events that come over a pipe, a network or from a camera as a source of input tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.event_spec import EventSpec
from stepcell.runtime.media.events.bad_events import BadEvents, OnBadEvent
from stepcell.runtime.media.events.byte_stream import STDIN, TCP, ByteStream, is_fifo, open_byte_stream
from stepcell.runtime.media.events.dat import DatReader
from stepcell.runtime.media.events.header import read_header
from stepcell.runtime.media.events.live_cameras import CAMERAS, LiveCamera
from stepcell.runtime.media.events.raw import RawReader
from stepcell.runtime.media.events.reader import EventReader, require_size, validated
from stepcell.runtime.media.events.source import frame_rate
from stepcell.runtime.media.events.stream_clock import StreamClock
from stepcell.runtime.media.events.tensor import event_tensor
from stepcell.runtime.media.events.windows import split_windows
from stepcell.runtime.media.source import BadEvent, Source

__all__ = ["EventStream", "is_event_stream", "open_event_stream"]


class EventStream(Source):
    """The windows of live events, each as a tensor (C, H, W) float32.

    The header is read by the iteration, because it may come late. Windows by time go on in silence: empty ones come by
    the clock of this machine.

    Args:
        name: of the stream.
        opened: what is read, for `interrupt` and `close`.
        reader: waits for the header and returns the reader.
        spec: encoding of the tensor, and the window.
        size: (width, height) of the sensor in pixels, if the stream does not say.
        on_bad_event: as of `BadEvents`.
    """

    live = True
    pixels: bool | None = False

    def __init__(
        self,
        name: str,
        opened: ByteStream | LiveCamera,
        reader: Callable[[], EventReader],
        spec: EventSpec,
        size: tuple[int, int] | None,
        on_bad_event: OnBadEvent,
    ) -> None:
        self.name: str = name
        self.seconds: float | None = None
        self.fps: Fraction | None = frame_rate(spec.window)
        self._opened, self._reader = opened, reader
        self._spec, self._size, self._on_bad_event = spec, size, on_bad_event
        self._bad: BadEvents | None = None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        reader = self._reader()
        width, height = require_size(reader, self._size)
        self._bad = BadEvents(self.name, (width, height), self._on_bad_event)
        clock = StreamClock(self.name)
        parts = clock.watch(validated(reader, self._bad))
        for events, end in split_windows(parts, self._spec.window, width * height, clock.now):
            self.seconds = end / 1e6
            yield event_tensor(events, self._spec, height, width)

    @property
    def bad_events(self) -> Mapping[BadEvent, int]:  # type: ignore[override]  # a property stands for the attribute
        """Bad events so far, by kind."""
        return self._bad.counts if self._bad is not None else {}

    def interrupt(self) -> None:
        self._opened.interrupt()

    def close(self) -> None:
        self._opened.close()


def is_event_stream(text: str) -> bool:
    """Whether an input of an event model is a stream: `-`, a named pipe, `tcp://HOST:PORT` or a camera."""
    return text == STDIN or text.startswith((TCP, *CAMERAS)) or is_fifo(Path(text))


def open_event_stream(
    text: str, spec: EventSpec, size: tuple[int, int] | None, on_bad_event: OnBadEvent
) -> EventStream:
    """Open a stream of which `is_event_stream` is true.

    Raises:
        UsageError: a URL of another form.
        InputError: it cannot be opened.
        MissingDependencyError: the package of the camera's driver is not installed.
    """
    camera = next((camera for scheme, camera in CAMERAS.items() if text.startswith(scheme)), None)
    if camera is not None:
        driver = camera(text)
        return EventStream(text, driver, lambda: driver, spec, size, on_bad_event)
    stream = open_byte_stream(text)
    reader = functools.partial(_reader_of, stream)
    return EventStream(stream.name, stream, reader, spec, size, on_bad_event)


def _reader_of(stream: ByteStream) -> EventReader:
    """The reader of a stream, by its header."""
    header = read_header(stream)
    if not header:
        start = stream.read(8)
        began = f"it begins with {start.hex(' ')}" if start else "it is empty"
        raise InputError(
            f"{stream.name}: expected a Prophesee RAW or DAT file with its header, {began}",
            hint="send the whole file, such as: cat recording.raw | stepcell run MODEL --input -",
        )
    kind = RawReader if header.keys() & {"evt", "format"} else DatReader
    return kind(stream.name, stream, header)
