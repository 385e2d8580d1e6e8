"""open_source: opens an input by its name, such as a path, a URL, `camera:0` or `-`."""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
from pathlib import Path

from stepcell.errors import InputError, UsageError
from stepcell.event_spec import EventSpec
from stepcell.nv12 import Nv12
from stepcell.runtime.media.events.bad_events import OnBadEvent
from stepcell.runtime.media.events.formats import EVENT_FILES, is_event_file
from stepcell.runtime.media.events.source import EventSource
from stepcell.runtime.media.events.stream_source import is_event_stream, open_event_stream
from stepcell.runtime.media.npy_file import ArraySource
from stepcell.runtime.media.picture_folder import FolderSource, matching_pictures
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.media.source import Source
from stepcell.runtime.media.video_reader import CAMERA, VideoSource

__all__ = ["STDIN", "is_remote", "open_source"]

STDIN = "-"
_EITHER = (".npy", ".bin")  # hold pictures or events, as the model takes


def open_source(
    text: str,
    *,
    channels: int = 3,
    nv12: Nv12 | None = None,
    size: tuple[int, int] | None = None,
    events: EventSpec | None = None,
    on_bad_event: OnBadEvent = "stop",
    event_stream: str | None = None,
) -> Source:
    """Open an input.

    Args:
        text: a video file or URL, a folder of pictures or a pattern such as `frames/*.png`, a .npy file, `camera:N`,
            or `-` for stdin; for an event model an event file, as of `open_events`, or a stream of events: `-`, a named
            pipe, tcp://HOST:PORT, dv://HOST:PORT or neuromorphic://SERIAL.
        channels: channels of raw frames on stdin: 3 (rgb24), 1 (gray8) or 4.
        nv12: give frames as NV12 of this matrix and range; None: as RGB or grey.
        size: (width, height) in pixels, of raw frames on stdin, or of the sensor if an event file does not say.
        events: encoding of the events of an event model; None: the model takes pictures.
        on_bad_event: "stop" before an event outside the sensor or earlier than the one before, "drop" or "clamp" it.
        event_stream: which of several streams of events of a file, as of `open_events`.

    Raises:
        UsageError: `-` without a size, a size or an option of events for an input that does not take one, or a file of
            several streams of events of which none is chosen.
        InputError: the input does not exist, cannot be read, or is not of the kind that the model takes.
        MissingDependencyError: PyAV, which reads videos and pictures, or the reader of an event file is not installed.
    """
    if events is not None and is_event_stream(text):
        if event_stream is not None:
            raise UsageError(f"--event-stream {event_stream}: {text} carries one stream")
        return open_event_stream(text, events, size, on_bad_event)
    if events is None and (event_stream is not None or on_bad_event != "stop"):
        option = f"--event-stream {event_stream}" if event_stream is not None else f"--on-bad-event {on_bad_event}"
        raise UsageError(f"{option}: is for events, and the model takes pictures")
    either = events is None and Path(text).suffix.lower() in _EITHER
    if (events is not None) != is_event_file(Path(text)) and not either:
        wanted = "events" if events is not None else "pictures"
        files = (
            ", ".join((*EVENT_FILES, "-", "a named pipe", "tcp://HOST:PORT", "dv://HOST:PORT", "neuromorphic://SERIAL"))
            if events is not None
            else "a video, pictures or .npy"
        )
        raise InputError(f"{text}: the model takes {wanted}", hint=f"expected {files}")
    if events is not None:
        return EventSource(Path(text), events, size, on_bad_event=on_bad_event, stream=event_stream)
    if (text == STDIN) != (size is not None):
        raise UsageError("--size: required for raw frames on stdin (--input -), not accepted for other pictures")
    if size is not None:
        return _open_stdin(size, channels, nv12 is not None)
    if is_remote(text):
        return VideoSource(text, nv12)
    path = Path(text)
    if glob.has_magic(text) and not path.exists() and (pictures := matching_pictures(text)):
        return FolderSource(path, pictures, nv12)
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise InputError(f"{text}: cannot be read ({error.strerror})") from error
    if folder:
        return FolderSource(path, nv12=nv12)
    if path.suffix.lower() == ".npy":
        return ArraySource(path, nv12=nv12 is not None)
    return VideoSource(text, nv12)


def is_remote(text: str) -> bool:
    """Whether `text` names a camera or a URL, that is an input that can be lost and reopened."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) or CAMERA.fullmatch(text))


def _open_stdin(size: tuple[int, int], channels: int, nv12: bool) -> RawSource:
    if sys.stdin is None:
        raise InputError("stdin: is closed")
    os.set_blocking(sys.stdin.fileno(), True)  # a non-blocking read would return an incomplete frame
    # A duplicate, because a thread may still read when the interpreter closes sys.stdin at exit.
    return RawSource(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), size, channels, nv12=nv12)
