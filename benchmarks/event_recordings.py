"""Recordings that benchmarks/events.py reads: words as a 1280x720 camera sends them, of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SIZE", "evt3_block", "write_dat", "write_evt2", "write_evt3"]

SIZE = (1280, 720)
_EVENTS_PER_SECOND = 20e6


def write_evt3(path: Path, size: int, seed: int = 0) -> None:
    """About `size` bytes of EVT 3.0: rows with one event, with a few and with vectors, as moving edges give them."""
    header = f"% evt 3.0\n% format EVT3;height={SIZE[1]};width={SIZE[0]}\n% geometry {SIZE[0]}x{SIZE[1]}\n% end\n"
    rng, time = np.random.default_rng(seed), 0
    with path.open("wb") as file:
        file.write(header.encode())
        while file.tell() < size:
            times = time + np.cumsum(rng.random(50_000) < 0.15).astype(np.int64)
            file.write(_evt3_words(rng, times, None if time == 0 else time)[0].tobytes())
            time = int(times[-1])


def evt3_block(events: int, microseconds: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Words with about so many events over a multiple of 4096 us, and the places of the upper halves of the time.

    Added to these, they are the block that follows.
    """
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, microseconds, int(events / 3.37)))
    return _evt3_words(rng, times, None)


def _evt3_words(
    rng: np.random.Generator, times: NDArray[np.int64], before: int | None
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Words of a row at each time: the time, the row, then its events."""
    rows = len(times)
    vectors = rng.random(rows) < 0.3
    singles = np.where(vectors, 0, rng.geometric(0.6, rows))
    length = 2 + np.where(vectors, 1 + 3, singles)  # time, row, then base and three vectors or single events
    begins = np.cumsum(length) - length
    words = np.empty(length.sum(), np.int64)
    x = rng.integers(0, SIZE[0] - 40, len(words))
    words[:] = 2 << 12 | rng.integers(0, 2, len(words)) << 11 | x
    words[begins] = 6 << 12 | times & 0xFFF
    words[begins + 1] = rng.integers(0, SIZE[1], rows)
    at = begins[vectors]
    words[at + 2] = 3 << 12 | rng.integers(0, 2, len(at)) << 11 | x[at]
    for place, bits in ((3, 12), (4, 12), (5, 8)):
        masks = rng.integers(0, 1 << bits, len(at)) & rng.integers(0, 1 << bits, len(at))
        words[at + place] = (4 if bits == 12 else 5) << 12 | masks
    changed = np.flatnonzero(np.diff(times >> 12, prepend=-1 if before is None else before >> 12))
    words = np.insert(words, begins[changed], 8 << 12 | times[changed] >> 12 & 0xFFF)
    return words.astype("<u2"), begins[changed] + np.arange(len(changed))


def write_evt2(path: Path, size: int, seed: int = 0) -> None:
    """About `size` bytes of EVT 2.0."""
    header = f"% evt 2.0\n% format EVT2;height={SIZE[1]};width={SIZE[0]}\n% geometry {SIZE[0]}x{SIZE[1]}\n% end\n"
    rng, time = np.random.default_rng(seed), 64
    with path.open("wb") as file:
        file.write(header.encode())
        while file.tell() < size:
            x, y, p, t = _events(rng, time, 100_000)
            words = p << 28 | (t & 63) << 22 | x << 11 | y
            changed = np.flatnonzero(np.diff(t >> 6, prepend=-1))
            words = np.insert(words, changed, 8 << 28 | t[changed] >> 6)
            file.write(words.astype("<u4").tobytes())
            time = int(t[-1])


def write_dat(path: Path, size: int, seed: int = 0) -> None:
    """About `size` bytes of DAT."""
    header = f"% Data file containing CD events.\n% Version 2\n% Width {SIZE[0]}\n% Height {SIZE[1]}\n"
    rng, time = np.random.default_rng(seed), 0
    with path.open("wb") as file:
        file.write(header.encode() + bytes([0x0C, 8]))
        while file.tell() < size:
            x, y, p, t = _events(rng, time, 100_000)
            records = np.empty((len(t), 2), "<u4")
            records[:, 0], records[:, 1] = t, x | y << 14 | p << 28
            file.write(records.tobytes())
            time = int(t[-1])


def _events(rng: np.random.Generator, time: int, count: int) -> tuple[NDArray[np.int64], ...]:
    t = time + np.sort(rng.integers(0, int(count / _EVENTS_PER_SECOND * 1e6), count))
    # Most events lie on a few edges, the rest anywhere.
    edge = (rng.integers(0, 8, count) * 160 + t // 300 + rng.integers(0, 12, count)) % SIZE[0]
    x = np.where(rng.random(count) < 0.8, edge, rng.integers(0, SIZE[0], count))
    columns: list[NDArray[Any]] = [x, rng.integers(0, SIZE[1], count), rng.integers(0, 2, count), t]
    return tuple(column.astype(np.int64) for column in columns)
