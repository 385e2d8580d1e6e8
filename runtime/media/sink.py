"""Sink: the protocol of frame outputs."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from stepcell.errors import OutputError

__all__ = ["Sink", "TimedSink", "output_errors"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sink(Protocol):
    """An output that takes results one by one.

    Files are written under a temporary name and renamed when they are complete. Exactly one of `close`,
    `salvage` and `abandon` ends a sink, apart from `salvage` after a `close` that raised.

    Attributes:
        name: as the user wrote it; "stdout" for `-`.
        takes_pixels: `write` takes pixels (H, W, C) uint8; otherwise the output tensor of the model.
        whole: optional; frames that the file holds if the process is killed now, where fewer than were written.
        replaces: `close` and `salvage` replace a file that existed before.
    """

    name: str
    takes_pixels: bool
    replaces: bool

    def write(self, frame: NDArray[Any]) -> None: ...

    def close(self) -> None:
        """Finish the output, also when the stream ended early, and rename it to its name."""

    def salvage(self) -> int:
        """After `write` or `close` raised: keep the complete frames. Returns their number; 0: as `abandon`."""
        ...

    def abandon(self) -> None:
        """Delete what was written; an older file of the same name stays."""


@runtime_checkable
class TimedSink(Sink, Protocol):
    """A sink that keeps the timestamps of its frames, such as a video."""

    def write_at(self, frame: NDArray[Any], seconds: float) -> None:
        """Take the next result, as `Sink.write`.

        Args:
            frame: pixels (H, W, C) uint8.
            seconds: timestamp, above that of the frame before; the first one is the start of the output.
        """


@contextlib.contextmanager
def output_errors(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Re-raise OSError, and errors of these kinds, as OutputError.

    Args:
        name: name of the output, for the message.
    """
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except caught as error:
        full = getattr(error, "errno", None) in _DISK_FULL
        raise OutputError(
            f"{name}: cannot be written ({getattr(error, 'strerror', None) or error})",
            hint="free some space there, or write to another disk" if full else None,
        ) from error
