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


def encode_evt2(events: Events) -> NDArray[np.uint32]:
    """One word per event, and a time word whenever the time changes."""
    words, high = [], None
    for x, y, p, t in zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True):
        if high != t >> 6:
            high = t >> 6
            words.append(8 << 28 | high & 0xFFFFFFF)
        words.append(int(p) << 28 | (t & 63) << 22 | x << 11 | y)
    return np.array(words, "<u4")


def encode_evt3(events: Events, *, vectors: bool = True) -> NDArray[np.uint16]:
    """Events of the same time, row and polarity with increasing x become vectors."""
    words: list[int] = []
    rows = list(zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True))
    time: int | None = None
    row: int | None = None
    at = 0
    while at < len(rows):
        x, y, p, t = rows[at]
        if time is None or t >> 12 != time >> 12:
            words.append(8 << 12 | t >> 12 & 0xFFF)
            time = t >> 12 << 12  # the lower half restarts at zero
        if t != time:
            words.append(6 << 12 | t & 0xFFF)
            time = t
        if y != row:
            words.append(0 << 12 | y)
            row = y
        group = [x]
        while at + len(group) < len(rows) and rows[at + len(group)][1:] == (y, p, t):
            following = rows[at + len(group)][0]
            if following <= group[-1]:
                break
            group.append(following)
        at += len(group) if vectors else 1
        if len(group) == 1 or not vectors:
            words.append(2 << 12 | int(p) << 11 | x)
            continue
        words.append(3 << 12 | int(p) << 11 | x)
        base = x
        while base <= group[-1]:
            length, kind = (12, 4) if group[-1] - base >= 8 else (8, 5)
            words.append(kind << 12 | sum(1 << g - base for g in group if base <= g < base + length))
            base += length
    return np.array(words, "<u2")
