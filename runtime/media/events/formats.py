"""Formats of event files: which reader opens a file, by its suffix in any case; docs/events.md says how to add one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from stepcell.errors import InputError
from stepcell.runtime.media.events.dat import DatReader
from stepcell.runtime.media.events.npz import NpzReader
from stepcell.runtime.media.events.raw import RawReader
from stepcell.runtime.media.events.reader import EventReader

__all__ = ["EVENT_FILES", "is_event_file", "open_events"]

_READERS: dict[str, Callable[[Path, BinaryIO], EventReader]] = {
    ".dat": DatReader,
    ".raw": RawReader,
    ".npz": NpzReader,
}
EVENT_FILES = tuple(_READERS)


def is_event_file(path: Path) -> bool:
    """Whether a path names an event file, by its suffix."""
    return path.suffix.lower() in _READERS


def open_events(path: Path) -> EventReader:
    """Open an event file with the reader of its suffix.

    Raises:
        InputError: the file cannot be read, or is not of the format of its suffix.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: is no event file by its suffix", hint=f"expected {', '.join(EVENT_FILES)}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return reader(path, file)
    except BaseException:
        file.close()
        raise
