"""Temporary output file: renamed to its final name when it is complete, or deleted."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stepcell.files import atomic_path

__all__ = ["TemporaryFile"]


class TemporaryFile:
    """A file beside `path` that replaces it or is deleted: `atomic_path` without a `with` block.

    Attributes:
        path: the temporary file.
        replaces: a file existed at the final path when this was created.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._stack = contextlib.ExitStack()
        self.path = self._stack.enter_context(atomic_path(path))
        self.replaces = path.exists()

    def keep(self) -> None:
        """Rename it to the final path.

        Raises:
            OutputError: it cannot be renamed.
        """
        self._stack.close()

    def delete(self) -> None:
        """Delete it, if the folder still permits that."""
        with contextlib.suppress(_Deleted, OSError), self._stack:
            raise _Deleted


class _Deleted(Exception):
    """Leaves the block of `atomic_path` with an error, so that the file is deleted."""
