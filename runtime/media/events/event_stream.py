"""Event Stream reader: .es files, through the package faery.

faery has wheels for x86-64 and aarch64 on every Python, and counts y from the upper edge. The format counts it from the
lower edge (sepia.hpp, the format's own implementation, says so); the package event_stream returns it as stored, so its
pictures are upside down unless y is turned.
https://github.com/neuromorphic-paris/event_stream
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stepcell.errors import InputError
from stepcell.optional_imports import require
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.library_reader import read_from, reading

__all__ = ["EventStreamReader"]

_MAGIC, _DVS = b"Event Stream", 1
_KINDS = ("generic", "DVS", "ATIS", "display", "color")


class EventStreamReader:
    """The events of an Event Stream file of DVS events.

    Raises:
        InputError: not an Event Stream file, or of events of another kind.
        MissingDependencyError: faery is not installed.
    """

    format = "Event Stream"

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        head = file.read(16)
        file.close()
        if len(head) < 16 or not head.startswith(_MAGIC):
            raise InputError(f"{path}: not an Event Stream file")
        if head[15] != _DVS:
            kind = _KINDS[head[15]] if head[15] < len(_KINDS) else str(head[15])
            raise InputError(
                f"{path}: an Event Stream of {kind} events, expected DVS events",
                hint="an ATIS recording is converted by leaving out its exposure events" if kind == "ATIS" else None,
            )
        faery = require("faery", extra="es", purpose="reading .es")
        with reading(self.name, "not a readable Event Stream file"):
            self._stream = faery.events_stream_from_file(path)
            self.size: tuple[int, int] | None = tuple(self._stream.dimensions())

    def __iter__(self) -> Iterator[Events]:
        for found in read_from(iter(self._stream), self.name):
            yield Events.of(found["x"], found["y"], found["p"], found["t"])

    def close(self) -> None:
        self._stream = None
