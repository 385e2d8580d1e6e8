"""Snapshots of a run: written periodically, and resumed from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from stepcell.errors import InputError, OutputError, UsageError
from stepcell.runtime.loop.snapshot import Snapshot
from stepcell.runtime.loop.step_loop import StepLoop

__all__ = ["SNAPSHOT_EVERY", "SnapshotWriter", "resume_streams"]

logger = logging.getLogger(__name__)

SNAPSHOT_EVERY = 250  # default number of frames between snapshots: ten seconds of a camera
_FRAMES = "frames"  # metadata key of the frames of each stream, if there are several


class SnapshotWriter:
    """Overwrites one file periodically.

    A snapshot that cannot be written, such as on a full disk, is logged and counted; the run continues, and the
    previous snapshot stays.

    Args:
        path: a .safetensors file.
        every: frames, or steps of several streams, between two snapshots.
        source: names of the streams, stored in the file.
        overwrite: replace an existing file that is no snapshot.

    Attributes:
        written, failed: number of snapshots.
    """

    def __init__(self, path: Path, every: int, source: str, *, overwrite: bool = False) -> None:
        self._path, self._every, self._source = path, every, source
        self._overwrite = overwrite
        self._saved: int | None = None  # frames in the last snapshot
        self.written = self.failed = 0

    def due(self, frames: int) -> bool:
        """Whether a snapshot is to be written after this many frames."""
        return frames % self._every == 0

    def save(self, loop: StepLoop, frames: int, streams: Mapping[str, int] | None = None) -> None:
        """Write the states of `loop`, unless the last snapshot has the same number of frames.

        Args:
            loop: the loop.
            frames: frames of the only stream, or steps of several streams.
            streams: frames of each stream by name, if there are several.
        """
        if frames == self._saved:
            return
        try:
            metadata = {"input": self._source}
            if streams is not None:
                metadata[_FRAMES] = msgspec.json.encode(streams).decode()
            loop.save(self._path, frame=frames, metadata=metadata, overwrite=self._overwrite)
        except (OutputError, UsageError) as error:  # UsageError: a foreign file was put there since the start
            logger.warning(f"frame {frames}: snapshot not written: {error.message}")
            self.failed += 1
        else:
            self._saved = frames
            self.written += 1


def resume_streams(loop: StepLoop, path: Path, names: Sequence[str]) -> dict[str, int]:
    """Load a snapshot into `loop`; returns the frames already stepped, by the name of the stream.

    Without a file, as at the first start of a service, nothing is loaded and the result is empty.

    Raises:
        InputError: the file cannot be read, is damaged, or is not a snapshot.
        StateError: the snapshot is of another model or another number of streams.
    """
    try:
        path.stat()
    except FileNotFoundError:
        logger.info(f"{path}: does not exist yet: starting from the beginning")
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    snapshot = loop.restore(path)
    if len(names) == 1:
        source = snapshot.metadata.get("input", "an unnamed input")
        logger.info(f"{path}: resuming at frame {snapshot.frame} of {source}")
        return {names[0]: snapshot.frame}
    frames = _frames_by_stream(snapshot)
    positions = ", ".join(f"frame {number} of {name}" for name, number in frames.items())
    logger.info(f"{path}: resuming at {positions}")
    return frames


def _frames_by_stream(snapshot: Snapshot) -> dict[str, int]:
    try:
        return msgspec.json.decode(
            snapshot.metadata.get(_FRAMES, ""), type=dict[str, Annotated[int, msgspec.Meta(ge=0)]]
        )
    except msgspec.DecodeError as error:
        raise InputError("snapshot: does not state how many frames of each stream were stepped") from error
