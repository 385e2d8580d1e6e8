"""Snapshots of a run: written periodically, and resumed from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError, UsageError
from stepcell.json_text import decode_json
from stepcell.runtime.loop.snapshot import Snapshot, write_snapshot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.streams.stepper import Stepper

__all__ = ["SNAPSHOT_EVERY", "SnapshotWriter", "resume_streams"]

logger = logging.getLogger(__name__)

SNAPSHOT_EVERY = 250  # default number of frames between snapshots: ten seconds of a camera
_FRAMES = "frames"  # metadata key of the frames of each stream, if there are several


@dataclass(frozen=True)
class _Captured:
    """States that are not in the file yet, and whether the outputs hold the frames up to them."""

    frames: int
    positions: Mapping[str, int]
    states: dict[str, NDArray[Any]]
    snapshot: Snapshot
    held: Callable[[], bool | None]


class SnapshotWriter:
    """Overwrites one file periodically, never with a state that is ahead of the frames that the outputs hold.

    An encoder keeps frames back, and a disk may be full: states wait in memory until the outputs hold all frames
    before them, so a run that resumes from the file skips none. A snapshot that cannot be written is logged and
    counted; the run continues, and the previous snapshot stays.

    Args:
        path: a .safetensors file.
        every: frames, or steps of several streams, between two snapshots.
        source: names of the streams, stored in the file.
        overwrite: replace an existing file that is no snapshot.

    Attributes:
        written, failed: number of snapshots.
        positions: frames of each stream in the file, by name; empty: none was written.
    """

    def __init__(self, path: Path, every: int, source: str, *, overwrite: bool = False) -> None:
        self._path, self._every, self._source = path, every, source
        self._overwrite = overwrite
        self._captured: int | None = None  # frames in the last states that were captured
        self._waiting: list[_Captured] = []  # the oldest states that wait, and the newest
        self.written = self.failed = 0
        self.positions: Mapping[str, int] = {}

    def due(self, frames: int) -> bool:
        """Whether a snapshot is to be written after this many frames."""
        return frames % self._every == 0

    def save(
        self,
        stepper: Stepper,
        frames: int,
        streams: Mapping[str, int] | None = None,
        *,
        held: Callable[[], bool | None] = lambda: True,
    ) -> None:
        """Capture the states, unless the last ones have the same number of frames, and `flush`.

        Args:
            stepper: has the states.
            frames: frames of the only stream, or steps of several streams.
            streams: frames of each stream by name, if there are several.
            held: whether the outputs hold these frames, whatever happens to the process; None: they never will.
        """
        if frames == self._captured:
            return
        self._captured = frames
        metadata = {"input": self._source}
        if streams is not None:
            metadata[_FRAMES] = msgspec.json.encode(streams).decode()
        states, snapshot = stepper.capture(frame=frames, metadata=metadata)
        positions = {self._source: frames} if streams is None else streams
        self._waiting = [*self._waiting[:1], _Captured(frames, positions, states, snapshot, held)]
        self.flush()

    def flush(self) -> None:
        """Write the newest states that the outputs hold, if there are any; call it after every step."""
        if not self._waiting:
            return
        answers = [each.held() for each in self._waiting]
        if True in answers:
            newest = len(answers) - 1 - answers[::-1].index(True)
            self._write(self._waiting[newest])
            self._waiting, answers = self._waiting[newest + 1 :], answers[newest + 1 :]
        self._waiting = [each for each, answer in zip(self._waiting, answers, strict=True) if answer is not None]

    def _write(self, captured: _Captured) -> None:
        try:
            write_snapshot(self._path, captured.states, captured.snapshot, overwrite=self._overwrite)
        except (OutputError, UsageError) as error:  # UsageError: a foreign file was put there since the start
            logger.warning(f"frame {captured.frames}: snapshot not written: {error.message}")
            self.failed += 1
        else:
            self.positions = captured.positions
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
    return decode_json(
        snapshot.metadata.get(_FRAMES, ""),
        dict[str, Annotated[int, msgspec.Meta(ge=0)]],
        "snapshot",
        what="does not state how many frames of each stream were stepped",
    )
