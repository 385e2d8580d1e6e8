"""File helpers: atomic writes through a temporary file, reads whose errors name the file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from stepcell.errors import InputError, OutputError

__all__ = ["atomic_path", "human_size", "read_bytes", "sha256_file", "temporary_path", "write_atomic"]


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` for a file or folder that is later renamed to it; nothing is created.

    Create it with `open("xb")` or `mkdir()`, which apply the umask of the process: the result then has
    ordinary permissions, unlike that of `tempfile`, which is private to the user.
    """
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, renamed to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of one. An error leaves the old file.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder, expected a file name")
        if path.exists() and not path.is_file():  # for example /dev/null, which must not be replaced by a file
            raise OutputError(f"{path}: is a device or a pipe, expected the name of a file")
        temporary = temporary_path(path)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})", hint="choose another output path") from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # the folder is no longer writable
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
    """A size for display, for example `1.2 MB` for 1 234 567 bytes."""
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
