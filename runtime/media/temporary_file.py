"""Temporary output file: renamed to its final name when it is complete, or deleted."""

from __future__ import annotations

import os
from pathlib import Path

from stepcell.errors import OutputError
from stepcell.files import new_temporary
from stepcell.runtime.media.recovery import recover_recordings

__all__ = ["TemporaryFile"]


class TemporaryFile:
    """A file beside `path` that replaces it or is deleted: `atomic_path` without a `with` block.

    Attributes:
        path: the temporary file; the result, once it is kept.
        replaces: a file existed at the final path when this was created.
        kept: whether the result was moved elsewhere because the final path could not be replaced.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        recover_recordings(path.parent.absolute())
        self._temporary = new_temporary(path)
        self.replaces = path.exists()

    @property
    def path(self) -> Path:
        return self._temporary.path

    @property
    def kept(self) -> bool:
        return self._temporary.kept is not None

    def keep(self) -> None:
        """Rename it to the final path. Does nothing if it was kept before.

        Raises:
            OutputError: it cannot be renamed; it has a free name beside the final path then, which is `path`.
        """
        if self.kept:
            return
        try:
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self._temporary.target}: cannot be written ({error.strerror})") from error
        self._temporary.move_into_place()

    def delete(self) -> None:
        """Delete it, if the folder still permits that, unless it was kept."""
        self._temporary.delete()
