"""The snapshots of a run: when they are written, and what happens where they cannot be."""

from __future__ import annotations

from pathlib import Path

from stepcell.console import log
from stepcell.errors import OutputError
from stepcell.runtime.loop import StepLoop

__all__ = ["SnapshotWriter"]


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

    def save(self, loop: StepLoop, frames: int) -> None:
        """Write what `loop` remembers after so many frames, unless that is written already."""
        if frames == self._saved:
            return
        try:
            loop.save(self._path, frame=frames, metadata={"input": self._source})
        except OutputError as error:
            log(f"frame {frames}: no snapshot: {error.message}")
            self.failed += 1
        else:
            self._saved = frames
            self.written += 1
