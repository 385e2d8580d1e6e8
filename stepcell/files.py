"""Files: written whole or not at all, read with errors that name them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stepcell.errors import InputError, OutputError

__all__ = ["atomic_path", "human_size", "read_bytes", "sha256_file", "write_atomic"]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; moved into place when the block ends without an error.

    A reader sees the old file or the new one, never half of one, and an error leaves the old one.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder, expected a file name")
        if path.exists() and not path.is_file():  # such as /dev/null, which a file would replace
            raise OutputError(f"{path}: is a device or a pipe, expected the name of a file")
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})", hint="choose another output path") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; the result is an ordinary file
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that nobody may write to any more
            temporary.unlink()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_bytes(path: Path) -> bytes:
    """Contents of `path`.

    Raises:
        InputError: it does not exist, is a folder or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def human_size(size: int) -> str:
    """`1.2 MB` for 1 234 567 bytes."""
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
