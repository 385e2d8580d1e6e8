"""Snapshots of streams in a folder that servers share: names, order, and removal of those that are of no use."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path

from stepcell.errors import OutputError
from stepcell.overwrite import is_snapshot

__all__ = ["SnapshotStore"]

logger = logging.getLogger(__name__)
_NAME = re.compile(r"([0-9a-f]{16})-(\d{1,18})\.safetensors")
_SWEEP = 60.0  # seconds from one search for old files to the next


class SnapshotStore:
    """A folder with files `<id in hexadecimal>-<frame>.safetensors`: the state of a stream before that frame.

    Args:
        folder: made if it is absent.
        keep: seconds after which a file that nobody has replaced is removed: its stream has ended without END.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, *, keep: float) -> None:
        self.folder, self._keep, self._swept = folder, keep, -_SWEEP
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--snapshots {folder}: cannot be made ({error.strerror})") from error

    def path(self, stream: int, frame: int) -> Path:
        """The file of the state of a stream before a frame."""
        return self.folder / f"{stream:016x}-{frame}.safetensors"

    def before(self, stream: int, frame: int) -> list[tuple[int, Path]]:
        """Frames at most `frame` from which a stream can be continued, and their files, the last one first."""
        return [found for found in self._of(stream) if found[0] <= frame]

    def remove_before(self, stream: int, frame: int) -> None:
        """Remove the snapshots of a stream that are earlier than one at `frame`."""
        self._remove(path for number, path in self._of(stream) if number < frame)

    def forget(self, stream: int) -> None:
        """Remove all snapshots of a stream, which has ended."""
        self._remove(path for _, path in self._of(stream))

    def sweep(self) -> int:
        """Remove old files of any stream, at most once a minute; the number of them."""
        now = time.monotonic()
        if now - self._swept < _SWEEP:
            return 0
        self._swept = now
        oldest, old = time.time() - self._keep, []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if _NAME.fullmatch(path.name) and path.stat().st_mtime < oldest and is_snapshot(path):
                    old.append(path)
        self._remove(old)
        return len(old)

    def _of(self, stream: int) -> list[tuple[int, Path]]:
        found = []
        for path in self.folder.glob(f"{stream:016x}-*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[2]), path))
        return sorted(found, reverse=True)

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning(f"{path}: an old snapshot cannot be removed ({error.strerror})")
