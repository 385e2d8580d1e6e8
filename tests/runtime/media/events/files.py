"""Event files for tests: some events, reading a file back, and the layout of a RAW file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.media.events import Events
from stepcell.runtime.media.events.bad_events import BadEvents
from stepcell.runtime.media.events.formats import open_events
from stepcell.runtime.media.events.reader import validated

SIZE = (640, 480)


def some_events(count: int = 5000, *, span: int = 40_000_000, seed: int = 0) -> Events:
    """In order of time, many of the same time and row; the counter of EVT 3.0 wraps twice."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.choice(rng.integers(0, span, count // 4), count))
    y = rng.integers(0, 12, count) * 40
    return Events.of(rng.integers(0, SIZE[0], count), y, rng.integers(0, 2, count), t)


def read(path: Path) -> Events:
    with contextlib.closing(open_events(path)) as reader:
        return Events.join(list(validated(reader, BadEvents(reader.name, reader.size or SIZE))))


def sensor(path: Path) -> tuple[int, int] | None:
    with contextlib.closing(open_events(path)) as reader:
        return reader.size


def assert_same(got: Events, wanted: Events) -> None:
    for name in "xypt":
        a, b = getattr(got, name), getattr(wanted, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), f"{name} differs first at {np.flatnonzero(a[: len(b)] != b[: len(a)])[:1]}"


def write_raw(path: Path, words: NDArray[Any], *lines: str) -> Path:
    path.write_bytes("".join(f"% {line}\n" for line in (*lines, "end")).encode() + words.tobytes())
    return path
