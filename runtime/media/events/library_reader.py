"""What the readers share that use other packages: errors that name the file, and columns of any dtype as events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, UsageError
from stepcell.library_errors import first_line, library_errors
from stepcell.runtime.media.events.columns import Events

__all__ = ["choose_stream", "events_of", "read_from", "reading"]

Item = TypeVar("Item")


@contextlib.contextmanager
def reading(name: str, what: str = "broken or truncated") -> Iterator[None]:
    """Raise what a library raises about a file as an InputError that names it.

    Extensions written in Rust raise a BaseException where they panic.
    """
    try:
        with library_errors(name, InputError, what=what):
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{name}: {what} ({first_line(error)})") from error


def read_from(items: Iterator[Item], name: str) -> Iterator[Item]:
    """The items of a library's iterator; its errors are those of `reading`."""
    while True:
        with reading(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def events_of(
    name: str, number: int, x: NDArray[Any], y: NDArray[Any], p: NDArray[Any], t: NDArray[Any]
) -> Iterator[Events]:
    """Columns of a file as events: all, or those before the first value that has no meaning, which is then raised.

    Args:
        name: name of the file, for messages.
        number: number of the first event.
        x, y: pixels, integers or whole floats.
        p: polarity, bool, 0 and 1, or -1 and 1.
        t: integers in microseconds or floats in seconds.

    Raises:
        InputError: a value that has no meaning; the events before it were returned.
    """
    errors: list[tuple[int, str]] = []
    for what, column, known, wanted in (
        ("x", x, _whole(x), "a pixel"),
        ("y", y, _whole(y), "a pixel"),
        ("p", p, np.isin(p, (-1, 0, 1)), "0 and 1, or -1 and 1"),
        ("t", t, _times(t), "integers in microseconds, or seconds of at most 1e12"),
    ):
        if not known.all():
            row = int(known.argmin())
            errors.append((row, f"{what}: expected {wanted}, got {column[row]}"))
    row, error = min(errors, default=(len(t), ""))
    x, y, p, t = x[:row], y[:row], p[:row], t[:row]
    if t.dtype.kind == "f":
        t = np.rint(t.astype(np.float64) * 1e6)
    x, y = (each.astype(np.int64) if each.dtype.kind == "f" else each for each in (x, y))
    if row:
        yield Events(x, y, p > 0, t.astype(np.int64))
    if error:
        raise InputError(f"{name}: event {number + row}: {error}")


def _times(column: NDArray[Any]) -> NDArray[np.bool_]:
    if column.dtype.kind == "f":
        known: NDArray[np.bool_] = np.abs(column) < 1e12
        return known
    return np.full(len(column), column.dtype.kind in "iu")


def _whole(column: NDArray[Any]) -> NDArray[np.bool_]:
    if column.dtype.kind in "iu":
        return np.ones(len(column), np.bool_)
    if column.dtype.kind != "f":
        return np.zeros(len(column), np.bool_)
    whole: NDArray[np.bool_] = (np.abs(column) < 1e6) & (column == np.floor(column))
    return whole


def choose_stream(name: str, streams: Sequence[str], wanted: str | None, *, kind: str) -> str:
    """The stream of events to read, of those of a file.

    Args:
        name: name of the file.
        streams: names of its streams of events.
        wanted: as the user gave it; None: the only one.
        kind: what a stream is called in this format, such as "topic".

    Raises:
        InputError: the file has no stream of events.
        UsageError: it has several, or not the wanted one.
    """
    if not streams:
        raise InputError(f"{name}: has no {kind} of events")
    listed = ", ".join(streams)
    if wanted is not None and wanted not in streams:
        raise UsageError(f"--event-stream {wanted}: {name} has no such {kind}", hint=f"it has {listed}")
    if wanted is None and len(streams) > 1:
        raise UsageError(
            f"{name}: has {len(streams)} {kind}s of events: {listed}", hint=f"choose one: --event-stream {streams[0]}"
        )
    return wanted or streams[0]
