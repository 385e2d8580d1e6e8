"""The snapshots of a run: when they are written, and what happens where they cannot be."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from stepcell.errors import InputError, OutputError
from stepcell.runtime.loop.snapshot import Snapshot
from stepcell.runtime.loop.step_loop import StepLoop

__all__ = ["SnapshotWriter", "saved_frames"]

logger = logging.getLogger(__name__)

FRAMES = "frames"  # key of the metadata of several streams


class SnapshotWriter:
    """Writes one file again and again.

    One that cannot be written (a full disk) is logged and counted: the stream matters more, and
    the last good one is still there.

    Args:
        path: a .safetensors file.
        every: after each multiple of this many frames of the stream.
        source: name of the stream, kept in the file.

    Attributes:
        written, failed: how many.
    """

    def __init__(self, path: Path, every: int, source: str) -> None:
        self._path, self._every, self._source = path, every, source
        self._saved: int | None = None  # frames that the last one holds
        self.written = self.failed = 0

    def due(self, frames: int) -> bool:
        """Whether there is one to be written after so many frames of the stream."""
        return frames % self._every == 0

    def save(self, loop: StepLoop, frames: int, streams: Mapping[str, int] | None = None) -> None:
        """Write what `loop` remembers after so many frames, unless that is written already.

        Args:
            streams: frames of each stream by its name, where there are several; `frames` are steps then.
        """
        if frames == self._saved:
            return
        try:
            metadata = {"input": self._source}
            if streams is not None:
                metadata[FRAMES] = msgspec.json.encode(streams).decode()
            loop.save(self._path, frame=frames, metadata=metadata)
        except OutputError as error:
            logger.warning(f"frame {frames}: no snapshot: {error.message}")
            self.failed += 1
        else:
            self._saved = frames
            self.written += 1


def saved_frames(snapshot: Snapshot) -> dict[str, int]:
    """Frames of each stream by its name, of a snapshot of several.

    Raises:
        InputError: it does not say.
    """
    try:
        return msgspec.json.decode(
            snapshot.metadata.get(FRAMES, ""), type=dict[str, Annotated[int, msgspec.Meta(ge=0)]]
        )
    except msgspec.DecodeError as error:
        raise InputError("snapshot: does not say how far each stream was") from error
