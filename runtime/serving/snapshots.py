"""Snapshots of the streams of a loop: written in the background, read when a stream comes back."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from stepcell.errors import StateError, StepcellError
from stepcell.runtime.loop.slots import Slot
from stepcell.runtime.loop.snapshot import Snapshot, read_snapshot, write_snapshot
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.serving.snapshot_store import SnapshotStore

__all__ = ["Found", "StreamSnapshots"]

logger = logging.getLogger(__name__)
_MOST_WAITING = 4  # files


class Found(NamedTuple):
    """A snapshot of a stream, of its state before a frame."""

    stream: int
    frame: int
    path: Path


class StreamSnapshots:
    """Writes and reads the states of single slots.

    Files are written and removed by one thread, in order. While more than a few wait, since the disk is slower than the
    frames, no further copies are made.

    Args:
        loop: with slots.
        store: the folder.
        every: frames from one snapshot of a stream to the next.

    Attributes:
        every: as given.
        written, failed: numbers of files, for metrics.
    """

    def __init__(self, loop: StepLoop, store: SnapshotStore, every: int) -> None:
        self._loop, self._store, self.every = loop, store, every
        self._writer = ThreadPoolExecutor(1, "snapshots")
        self._pending: list[Future[None]] = []
        self.written = self.failed = 0

    def write(self, stream: int, client: int, slot: Slot, frame: int, *, last: bool = False) -> bool:
        """Copy the state of a slot, and write it before long. A file that cannot be written is logged and counted.

        Args:
            last: the slot is given up, and the client may not have the answer to the last frame: earlier snapshots are
                kept, and the copy is always made.

        Returns:
            False: too many files wait to be written; nothing is done.
        """
        self._pending = [each for each in self._pending if not each.done()]
        if len(self._pending) >= _MOST_WAITING:
            if not last:
                return False
            self._pending[0].result()
        captured = self._loop.capture(slot, frame=frame, metadata=_metadata(stream, client))
        self._pending.append(self._writer.submit(self._write, stream, frame, *captured, last))
        return True

    def flush(self) -> None:
        """Wait until everything is written."""
        for each in self._pending:
            each.result()

    def before(self, stream: int, frame: int) -> list[Found]:
        """Snapshots from which a stream can be continued up to a frame, the last one first."""
        self.flush()
        return [Found(stream, number, path) for number, path in self._store.before(stream, frame)]

    def load(self, found: Found, client: int, slot: Slot) -> None:
        """Load a snapshot into a slot, whose state stays what it was if this fails.

        Raises:
            InputError: it cannot be read or is damaged.
            StateError: it is of another model, stream, client or size.
        """
        states, snapshot = read_snapshot(found.path, self._loop.contract)
        if snapshot.metadata != _metadata(found.stream, client) or snapshot.frame != found.frame:
            raise StateError(f"{found.path}: is of another client, or another stream than its name says")
        self._loop.load_state(states, slot)

    def forget(self, stream: int) -> None:
        """Remove the snapshots of a stream that has ended."""
        self._pending.append(self._writer.submit(self._store.forget, stream))

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._writer.shutdown()

    def _write(self, stream: int, frame: int, states: dict[str, NDArray[Any]], snapshot: Snapshot, last: bool) -> None:
        try:
            write_snapshot(self._store.path(stream, frame), states, snapshot)
            self.written += 1
            if not last:
                self._store.remove_before(stream, frame)
            self._store.sweep()
        except (StepcellError, OSError) as error:
            self.failed += 1
            logger.warning(f"snapshot of stream {stream:016x} before frame {frame}: {error}")


def _metadata(stream: int, client: int) -> dict[str, str]:
    return {"stream": f"{stream:016x}", "client": str(client)}
