"""Limit to what a small file may unpack to."""

from __future__ import annotations

from pathlib import Path

from stepcell.errors import CheckpointError
from stepcell.files import human_size

__all__ = ["MAX_EXPANSION", "check_expansion"]

MAX_EXPANSION = 8.0  # sizes of the file; weights hardly compress
_ALWAYS = 256 * 2**20  # bytes that any file may unpack to


def check_expansion(path: Path, size: int, max_expansion: float) -> None:
    """Refuse a file that unpacks to more than `max_expansion` times its size, and to more than 256 MiB.

    Args:
        size: bytes that the file's weights take in memory, as it declares them.

    Raises:
        CheckpointError: more than that.
    """
    own = path.stat().st_size
    if size > max(_ALWAYS, max_expansion * own):
        raise CheckpointError(
            f"{path}: {human_size(own)} that unpack to {human_size(size)}; at most {max_expansion:g} times the size of "
            "the file is read",
            hint=f"weights hardly compress; if you trust the file: --max-expansion {size // max(own, 1) + 1}",
        )
