"""File helpers: atomic writes through a temporary file, reads whose errors name the file."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stepcell.errors import InputError, OutputError

__all__ = [
    "RECORDINGS",
    "Temporary",
    "atomic_path",
    "human_size",
    "leftovers",
    "new_temporary",
    "read_bytes",
    "sha256_file",
    "temporary_path",
    "visible_path",
    "write_atomic",
]

RECORDINGS = (".mp4", ".mkv", ".mov", ".npy")  # files whose first part is of use, if the process is killed
_LEFTOVER = re.compile(r"\.(.+)\.([0-9a-f]{8})\.stepcell((?:\.[^.]*)?)")


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` for a file or folder that is later renamed to it; nothing is created.

    Create it with `open("xb")` or `mkdir()`, which apply the umask of the process: the result then has
    ordinary permissions, unlike that of `tempfile`, which is private to the user.
    """
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.stepcell{path.suffix}")


def visible_path(temporary: Path) -> Path:
    """A free name for a temporary file that cannot get its final one: `out.1a2b3c4d.mp4` for `out.mp4`."""
    name = _LEFTOVER.fullmatch(temporary.name)
    return temporary if name is None else temporary.with_name(f"{name[1]}.{name[2]}{name[3]}")


class Temporary:
    """An empty file or folder beside `target`, under a hidden name and with a lock that lasts as long as the process.

    The lock shows other processes that the file is being written. When the process is killed the lock ends, and the
    next one that writes into the folder finds the file with `leftovers`.

    Args:
        target: the final path.
        folder: create a folder.

    Attributes:
        path: path of the temporary file; of the result once `move_into_place` was called.
        kept: where the result is if it could not be moved to `target`; None: nothing was moved elsewhere.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, target: Path, *, folder: bool = False) -> None:
        self.target = target
        self.kept: Path | None = None
        for _ in range(3):  # in case another process locks the new file first, to remove it
            self.path = temporary_path(target)
            self.path.mkdir() if folder else self.path.touch(exist_ok=False)
            self._lock = _lock(self.path)
            if self._lock is not None:
                break
            self.delete()
        else:  # a file system without locks
            self.path.mkdir() if folder else self.path.touch(exist_ok=False)

    def move_into_place(self) -> None:
        """Rename to the final path, or else to a free name beside it: a result is not deleted because this fails.

        Raises:
            OutputError: the final path cannot be replaced, such as by a folder with files; `kept` says where the
                result is.
        """
        try:
            self.path.replace(self.target)
            self.path = self.target
        except OSError as error:
            free = visible_path(self.path)
            with contextlib.suppress(OSError):
                self.path.rename(free)
                self.path = free
            self.kept = self.path
            raise OutputError(
                f"{self.target}: cannot be written ({error.strerror})", hint=f"the result was kept: {self.kept}"
            ) from error
        finally:
            self._unlock()

    def delete(self) -> None:
        """Delete it, as far as the folder still permits that, unless it was moved."""
        if self.kept is None and self.path != self.target:
            _remove(self.path)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def leftovers(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Temporary files and folders of killed processes, with the path that each would have got.

    Those that a running process holds are not among them, nor is anything on a file system without locks. An item is
    locked until the next one is asked for, so that two processes do not get the same.
    """
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            name = _LEFTOVER.fullmatch(path.name)
            if name is None or path.is_symlink() or (lock := _lock(path)) is None:
                continue
            try:
                yield path, path.with_name(name[1] + name[3])
            finally:
                os.close(lock)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, renamed to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of one. An error leaves the old file. Temporary files that
    killed processes left in the folder are removed; recordings are left for `stepcell run`, which recovers them.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    temporary = new_temporary(path)
    try:
        yield temporary.path
        with temporary.path.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.move_into_place()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.delete()


def new_temporary(path: Path) -> Temporary:
    """A temporary file beside `path`, which must be the name of a file.

    Raises:
        OutputError: the folder does not exist or cannot be written, or `path` is a folder or a device.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder, expected a file name")
        if path.exists() and not path.is_file():  # for example /dev/null, which must not be replaced by a file
            raise OutputError(f"{path}: is a device or a pipe, expected the name of a file")
        _remove_leftovers(path.parent.absolute())
        return Temporary(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})", hint="choose another output path") from error


@functools.lru_cache(maxsize=256)  # once for each folder: snapshots are written often
def _remove_leftovers(folder: Path) -> None:
    for path, target in leftovers(folder):
        if path.is_file() and target.suffix.lower() not in RECORDINGS:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _lock(path: Path) -> int | None:
    """A descriptor with the lock of a file or folder; None: held by another process, gone, or no locks there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_bytes(path: Path, size: int = -1) -> bytes:
    """Contents of `path`, or its first `size` bytes.

    Raises:
        InputError: it does not exist, is a folder or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(size)
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
