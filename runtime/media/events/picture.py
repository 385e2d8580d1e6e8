"""Pictures and clips of events, for people: red where pixels became brighter, blue where darker."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.event_spec import EventWindow
from stepcell.files import atomic_path
from stepcell.optional_imports import require
from stepcell.overwrite import MARK
from stepcell.runtime.media.events.bad_events import BadEvents
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.formats import open_events
from stepcell.runtime.media.events.reader import validated
from stepcell.runtime.media.events.summary import EventSummary
from stepcell.runtime.media.events.windows import split_windows
from stepcell.runtime.media.source import FRAME_RATES
from stepcell.runtime.media.video_writer import VideoSink

__all__ = ["event_frame", "write_event_clip", "write_event_picture"]

_RISING, _FALLING, _GRID = np.array([215, 48, 39]), np.array([44, 90, 180]), np.array([200, 200, 200])
_PANELS, _COLUMNS = 6, 3  # windows in a picture, and how many stand side by side
_WIDEST, _SMALLEST = 640, 240  # pixels of a panel: a larger sensor is scaled down, a smaller one up
_STRIP = 80  # rows of the strip of time, for each polarity
_GAP = 4
_AFTER_IHDR = 8 + 25  # bytes of a PNG's signature and of its first chunk
Counts = NDArray[np.int64]
Pixels = NDArray[np.uint8]


def event_frame(events: Events, size: tuple[int, int]) -> Pixels:
    """The events of one window as pixels (H, W, 3): the more rising than falling events, the redder.

    Args:
        events: all on the sensor.
        size: (width, height) of the sensor in pixels.
    """
    return _coloured(_counts(events, size))


def write_event_picture(path: Path, summary: EventSummary, size: tuple[int, int], window: int) -> list[float]:
    """Write a picture of a recording: windows evenly over its time, and below them its events over time.

    Args:
        path: the .png.
        summary: of the recording, which is read again.
        size: (width, height) of the sensor in pixels.
        window: microseconds of a window.

    Returns:
        Start of each window in seconds after the first event, from the upper left one on.

    Raises:
        InputError: the file cannot be read any more.
        OutputError: the picture cannot be written.
        MissingDependencyError: PyAV is not installed.
    """
    av = require("av", extra="video", purpose="writing pictures")
    span = summary.end_us - summary.start_us
    count = max(1, min(_PANELS, span // window))
    starts = [summary.start_us + round((span - window) * at / max(1, count - 1)) for at in range(count)]
    panels = np.zeros((count, 2, size[1], size[0]), np.int64)
    width = _scaled(panels[0]).shape[2] * min(count, _COLUMNS) + _GAP * (min(count, _COLUMNS) - 1)
    strip = np.zeros((2, width), np.int64)
    for events in _parts(summary, size):
        for start, panel in zip(starts, panels, strict=True):
            first, last = np.searchsorted(events.t, [start, start + window])
            if first < last:
                panel += _counts(events[int(first) : int(last)], size)
        place = (events.t - summary.start_us) * (width - 1) // max(1, span)
        for at, rows in enumerate((~events.p, events.p)):
            strip[at] += np.bincount(place[rows], minlength=width)
    sheet = _sheet([_coloured(_scaled(panel)) for panel in panels], _over_time(strip))
    with atomic_path(path) as temporary:
        av.VideoFrame.from_ndarray(sheet, format="rgb24").save(str(temporary))
        temporary.write_bytes(_marked(temporary.read_bytes()))
    return [(start - summary.start_us) / 1e6 for start in starts]


def _marked(png: bytes) -> bytes:
    """A PNG with a comment, by which the next run knows the picture: a chunk tEXt after the first chunk, IHDR."""
    content = b"tEXtComment\x00" + MARK.encode("latin-1")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return png[:_AFTER_IHDR] + chunk + png[_AFTER_IHDR:]


def write_event_clip(path: Path, summary: EventSummary, size: tuple[int, int], window: int) -> int:
    """Write a clip with a frame for each window, at the speed of the recording; returns the number of frames.

    Args:
        path: .mp4, .mkv or .mov.
        summary: of the recording, which is read again.
        size: (width, height) of the sensor in pixels.
        window: microseconds of a window.

    Raises:
        InputError: the file cannot be read any more, or has a pause of more windows than the limit.
        OutputError: the clip cannot be written.
        MissingDependencyError: PyAV is not installed.
    """
    rate = min(max(Fraction(1_000_000, window), FRAME_RATES[0]), FRAME_RATES[1])
    sink, frames = VideoSink(path, rate), 0
    try:
        windows = split_windows(_parts(summary, size), EventWindow(size=window, unit="us"), size[0] * size[1])
        for events, _ in windows:
            sink.write(_coloured(_scaled(_counts(events, size))))
            frames += 1
    except BaseException:
        sink.abandon()
        raise
    sink.close()
    return frames


def _parts(summary: EventSummary, size: tuple[int, int]) -> Iterator[Events]:
    """The good events of a file, as far as it can be read: the summary says what is wrong with the rest."""
    with contextlib.closing(open_events(Path(summary.file), summary.stream)) as reader, contextlib.suppress(InputError):
        yield from validated(reader, BadEvents(reader.name, size, "drop", quiet=True))


def _counts(events: Events, size: tuple[int, int]) -> Counts:
    """Falling and rising events of each pixel (2, H, W)."""
    width, height = size
    place = (events.p * height + events.y.astype(np.int64)) * width + events.x
    return np.bincount(place, minlength=2 * height * width).reshape(2, height, width)


def _scaled(counts: Counts) -> Counts:
    """Sums of blocks of pixels where a panel would be too large, repeated pixels where it would be too small."""
    _, height, width = counts.shape
    block = -(-width // _WIDEST)
    if block > 1:
        padded = np.pad(counts, ((0, 0), (0, -height % block), (0, -width % block)))
        sums: Counts = padded.reshape(2, padded.shape[1] // block, block, -1, block).sum((2, 4))
        return sums
    times = max(1, _SMALLEST // max(height, width))
    return counts.repeat(times, 1).repeat(times, 2)


def _coloured(counts: Counts) -> Pixels:
    falling, rising = counts
    depth = (np.minimum(np.abs(rising - falling), 2) / 2)[..., None]
    colour = np.where((rising >= falling)[..., None], _RISING, _FALLING)
    shaded = 255 + (colour - 255) * depth
    shaded[(rising == falling) & (rising > 0)] = _GRID
    pixels: Pixels = np.rint(shaded).astype(np.uint8)
    return pixels


def _over_time(strip: Counts) -> Pixels:
    """Events over time: rising ones upwards, falling ones downwards, on one scale."""
    height = np.rint(strip / max(1, strip.max()) * _STRIP).astype(np.int64)
    rows = np.arange(_STRIP)[:, None]
    drawn = np.full((2 * _STRIP + 1, strip.shape[1], 3), 255, np.uint8)
    drawn[:_STRIP][rows >= _STRIP - height[1]] = _RISING
    drawn[_STRIP] = _GRID
    drawn[_STRIP + 1 :][rows < height[0]] = _FALLING
    return drawn


def _sheet(panels: list[Pixels], strip: Pixels) -> Pixels:
    height, width = panels[0].shape[:2]
    lines = -(-len(panels) // _COLUMNS)
    sheet = np.empty(((height + _GAP) * lines + len(strip), strip.shape[1], 3), np.uint8)
    sheet[:] = _GRID
    for at, panel in enumerate(panels):
        top, left = (height + _GAP) * (at // _COLUMNS), (width + _GAP) * (at % _COLUMNS)
        sheet[top : top + height, left : left + width] = panel
    sheet[-len(strip) :] = strip
    return sheet
