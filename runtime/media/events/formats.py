"""Formats of event files: which reader opens a file, by its suffix in any case; docs/events.md says how to add one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from stepcell.errors import InputError, UsageError
from stepcell.runtime.media.events.aedat4 import Aedat4Reader
from stepcell.runtime.media.events.byte_stream import is_fifo
from stepcell.runtime.media.events.dat import DatReader
from stepcell.runtime.media.events.event_stream import EventStreamReader
from stepcell.runtime.media.events.hdf5 import Hdf5Reader
from stepcell.runtime.media.events.nmnist import NMnistReader
from stepcell.runtime.media.events.npz import NpzReader
from stepcell.runtime.media.events.parquet import ParquetReader
from stepcell.runtime.media.events.raw import RawReader
from stepcell.runtime.media.events.reader import EventReader
from stepcell.runtime.media.events.rosbag import RosbagReader, is_rosbag_folder
from stepcell.runtime.media.events.structured_npy import StructuredNpyReader
from stepcell.runtime.media.events.text import TextReader

__all__ = ["EVENT_CLIPS", "EVENT_FILES", "is_event_file", "open_events"]

_READERS: dict[str, Callable[..., EventReader]] = {
    ".dat": DatReader,
    ".raw": RawReader,
    ".npz": NpzReader,
    ".npy": StructuredNpyReader,
    ".aedat4": Aedat4Reader,
    ".h5": Hdf5Reader,
    ".hdf5": Hdf5Reader,
    ".bag": RosbagReader,
    ".db3": RosbagReader,
    ".mcap": RosbagReader,
    ".es": EventStreamReader,
    ".csv": TextReader,
    ".txt": TextReader,
    ".zip": TextReader,
    ".bin": NMnistReader,
    ".parquet": ParquetReader,
}
_OF_SEVERAL = (Aedat4Reader, Hdf5Reader, RosbagReader)  # whose files may hold several streams of events
_CONVERTED = {".aedat": "AEDAT 1 to 3 is not read: DV converts it to .aedat4, dv-processing from Python"}
EVENT_FILES = tuple(_READERS)
EVENT_CLIPS = (".dat", ".raw", ".npz", ".aedat4", ".es", ".bag", ".mcap")  # in a folder; others are no events as often


def is_event_file(path: Path) -> bool:
    """Whether a path names an event file by its suffix, or the folder of a ROS 2 recording."""
    return path.suffix.lower() in (*_READERS, *_CONVERTED) or is_rosbag_folder(path)


def open_events(path: Path, stream: str | None = None) -> EventReader:
    """Open an event file.

    Args:
        path: the file, or the folder of a ROS 2 recording.
        stream: which of several streams of events to read: a topic of a rosbag, a number of AEDAT4, a group of HDF5.

    Raises:
        InputError: the file cannot be read, or is not of the format of its suffix.
        UsageError: several streams of events and none chosen, or one chosen of a format that holds only one.
        MissingDependencyError: the package that reads this format is not installed.
    """
    if is_fifo(path):
        raise InputError(f"{path}: is a pipe, and a file is needed", hint="`stepcell run` reads events from pipes")
    suffix = path.suffix.lower()
    reader = RosbagReader if is_rosbag_folder(path) else _READERS.get(suffix)
    if reader is None:
        hint = _CONVERTED.get(suffix) or f"expected {', '.join(EVENT_FILES)}"
        raise InputError(f"{path}: is no event file by its suffix", hint=hint)
    if reader in _OF_SEVERAL:
        reader = functools.partial(reader, stream=stream)
    elif stream is not None:
        raise UsageError(f"--event-stream {stream}: {path} is of a format that holds one stream")
    if is_rosbag_folder(path):
        return reader(path, None)
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if os.fstat(file.fileno()).st_size == 0:
            raise InputError(f"{path}: contains no event: the file is empty")
        return reader(path, file)
    except BaseException:
        file.close()
        raise
