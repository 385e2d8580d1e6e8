"""Loops over events that numba compiles; each gives bit by bit what the code in NumPy beside its caller gives.

Importing this module needs numba. It is compiled on first use, for seconds, and kept in a cache: beside this file, else
in the cache folder of the user, else, where neither can be written, for the process only.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "COMPILES",
    "KINDS",
    "LONGEST_SPAN",
    "TILE",
    "add_tiles",
    "add_tiles_sparse",
    "decode_evt2",
    "decode_evt3",
    "decode_evt21",
    "evt3_events",
    "evt21_events",
    "expand_tiles",
    "sort_by_tile",
    "subtract",
]

logger = logging.getLogger(__name__)

COMPILES = not numba.config.DISABLE_JIT  # in Python these loops would be slower than NumPy
GRID, VOLUME, HISTOGRAM = 0, 1, 2
OWN, NEXT = 0, 1  # the bin of an event, and the one after it
KINDS = {"voxel_grid": GRID, "event_volume": VOLUME, "histogram": HISTOGRAM}
SHIFT = 13
TILE = 1 << SHIFT  # pixels whose sums, of 8 bytes, fit into the cache of one core
LONGEST_SPAN = 1 << 62 - SHIFT - 1  # microseconds of a window: its times are packed beside pixels
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _part(function: _Function) -> _Function:
    """Compile a function that is called by compiled ones."""
    return cast(_Function, numba.njit(nogil=True)(function))


def _compiled(function: _Function) -> _Function:
    """Compile a function on its first call, or load it from the cache."""
    plain = numba.njit(nogil=True)(function)
    try:
        cached = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder can be written
        return cast(_Function, plain)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal cached
        try:
            return cached(*arguments)
        except OSError as error:  # raised before the function runs
            logger.warning(f"compiled loops over events are not kept: {error}")
            cached = plain
            return plain(*arguments)

    return cast(_Function, call)


@intrinsic  # type: ignore[untyped-decorator]
def _lowest(_typing_context: Any, _bits: Any) -> Any:
    """Position of the lowest bit of a number above zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return numba.uint64(numba.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _ones(_typing_context: Any, _bits: Any) -> Any:
    """The number of bits that are set."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return numba.uint64(numba.uint64), generate


@_part
def _continued(high: Any, value: Any) -> Any:
    """The upper part of the time after its counter of 28 bits, which wraps, says `value`; -1 before the first."""
    if high < 0:
        return value
    wrapped = value - (high & 0xFFFFFFF) < -(1 << 27)
    return value + ((high >> 28) + wrapped << 28)


@_compiled
def decode_evt2(words: Any, state: Any, x: Any, y: Any, p: Any, t: Any) -> int:
    """Decode words of EVT 2.0; returns the number of events. `state`: upper part of the time, -1 before the first."""
    high, count = state[0], 0
    for packed in words:
        word = np.int64(packed)
        kind = word >> 28
        if kind <= 1:
            if high >= 0:
                x[count], y[count], p[count] = word >> 11 & 0x7FF, word & 0x7FF, kind == 1
                t[count] = high << 6 | (word >> 22 & 0x3F)
                count += 1
        elif kind == 8:
            high = _continued(high, word & 0xFFFFFFF)
    state[0] = high
    return count


@_compiled
def evt21_events(heads: Any, valid: Any) -> int:
    """The number of events in words of EVT 2.1, at most."""
    count: Any = 0
    for index in range(len(heads)):
        if heads[index] < 2 << 28:
            count += np.int64(_ones(np.uint64(valid[index])))
    return int(count)


@_compiled
def decode_evt21(heads: Any, valid: Any, state: Any, x: Any, y: Any, p: Any, t: Any) -> int:
    """Decode words of EVT 2.1, given as their upper and lower halves; otherwise as `decode_evt2`."""
    high, count = state[0], 0
    for index in range(len(heads)):
        word, mask = np.int64(heads[index]), np.int64(valid[index])
        kind = word >> 28
        if kind <= 1:
            if high >= 0:
                first, row, time = word >> 11 & 0x7FF, word & 0x7FF, high << 6 | (word >> 22 & 0x3F)
                while mask:
                    x[count], y[count], p[count], t[count] = first + _lowest(mask), row, kind == 1, time
                    count += 1
                    mask &= mask - 1
        elif kind == 8:
            high = _continued(high, word & 0xFFFFFFF)
    state[0] = high
    return count


@_compiled
def evt3_events(words: Any) -> int:
    """The number of events in words of EVT 3.0, at most."""
    count: Any = 0
    for packed in words:
        word = np.int64(packed)
        kind = word >> 12
        mask = word & 0xFFF if kind == 4 else word & 0xFF if kind == 5 else np.int64(kind == 2)
        count += np.int64(_ones(np.uint64(mask)))
    return int(count)


@_compiled
def decode_evt3(words: Any, state: Any, x: Any, y: Any, p: Any, t: Any) -> int:
    """Decode words of EVT 3.0; returns the number of events.

    Args:
        state: the upper half of the time (-1: not known), the lower one, the row (-1: not known), base and polarity of
            vectors; changed.
    """
    high, low, row, base, base_p = state[0], state[1], state[2], state[3], state[4]
    time = high << 12 | low
    count = 0
    for packed in words:
        word = np.int64(packed)
        kind, value = word >> 12, word & 0xFFF
        if kind == 2:
            if high >= 0 and row >= 0:
                x[count], y[count], p[count], t[count] = value & 0x7FF, row, value >> 11, time
                count += 1
        elif kind == 4 or kind == 5:
            mask = value if kind == 4 else value & 0xFF
            if high >= 0 and row >= 0:
                while mask:
                    x[count], y[count], p[count], t[count] = base + _lowest(mask), row, base_p, time
                    count += 1
                    mask &= mask - 1
            base += 12 if kind == 4 else 8
        elif kind == 0:
            row = value & 0x7FF
        elif kind == 6:
            low = value
            time = high << 12 | low
        elif kind == 3:
            base, base_p = value & 0x7FF, value >> 11
        elif kind == 8:
            before = high
            if high < 0:
                high = value
            else:
                wrapped = value - (high & 0xFFF) < -(1 << 11)
                high = value + ((high >> 12) + wrapped << 12)
            if high != before:
                low = 0
                time = high << 12
    state[0], state[1], state[2], state[3], state[4] = high, low, row, base, base_p
    return count


@_part
def _bin(kind: int, time: Any, span: int, bins: int) -> Any:
    if kind == GRID:
        return min(np.int64(time * (bins - 1) / span), bins - 1)
    if kind == VOLUME:
        return min(max(np.int64(math.floor(time * bins / span - 0.5)), 0), bins - 1)
    return min(time * bins // span, bins - 1)


@_compiled
def sort_by_tile(
    kind: int, x: Any, y: Any, p: Any, t: Any, width: int, bins: int, split: bool, ends: Any, packed: Any
) -> None:
    """Sort events in order of time by channel, then tile, keeping their order. A tile is `TILE` pixels in a row.

    Args:
        kind: GRID, VOLUME or HISTOGRAM.
        x, y, p, t: the events, in order of time and of less than `LONGEST_SPAN`.
        width: width of the sensor.
        bins: number of bins.
        split: falling and rising events have channels of their own, and all count as +1.
        ends: (channels, tiles) of zeros: filled with the end of each tile's events; they begin where the one
            before ends.
        packed: filled with time, pixel of the tile and sign of the sorted events.
    """
    count, first = len(t), t[0]
    span = max(1, t[count - 1] - first)
    starts = np.zeros(bins + 1, np.int64)  # first event of each bin
    starts[bins] = count
    for index in range(1, bins):
        low, high = starts[index - 1], count
        while low < high:
            middle = (low + high) // 2
            if _bin(kind, t[middle] - first, span, bins) >= index:
                high = middle
            else:
                low = middle + 1
        starts[index] = low
    for index in range(bins):
        for event in range(starts[index], starts[index + 1]):
            channel = index + bins if split and p[event] else index
            ends[channel, np.int64(y[event]) * width + x[event] >> SHIFT] += 1
    total = 0
    for channel in range(ends.shape[0]):
        for tile in range(ends.shape[1]):
            total, ends[channel, tile] = total + ends[channel, tile], total
    for index in range(bins):
        for event in range(starts[index], starts[index + 1]):
            channel = index + bins if split and p[event] else index
            pixel = np.int64(y[event]) * width + x[event]
            place = ends[channel, pixel >> SHIFT]
            ends[channel, pixel >> SHIFT] = place + 1
            packed[place] = t[event] - first << SHIFT + 1 | (pixel & TILE - 1) << 1 | (split or p[event])


@_part
def _add(kind: int, span: int, bins: int, index: int, to: int, packed: Any, sums: Any) -> None:
    """Add what events of bin `index` give to their own bin, or to the next one."""
    for event in packed:
        time = event >> SHIFT + 1
        if kind == GRID:
            share = time * (bins - 1) / span - index
            share = 1 - share if to == OWN else share
        elif kind == VOLUME:
            share = max(0.0, 1 - abs(index - (time * bins / span - 0.5)))
            share = share if to == OWN else 1 - share
        else:
            share = 1.0
        sums[event >> 1 & TILE - 1] += share if event & 1 else -share


@_part
def _add_tile(kind: int, span: int, bins: int, tile: int, ends: Any, packed: Any, sums: Any) -> Any:
    """Sum one tile of one channel, in the order of NumPy's sums; returns its events, and those of the bin before.

    Args:
        tile: its number, counted over all channels.
    """
    tiles, ends = ends.shape[1], ends.ravel()
    index = tile // tiles % bins
    own = packed[ends[tile - 1] if tile else 0 : ends[tile]]
    before = packed[:0]
    _add(kind, span, bins, index, OWN, own, sums)
    if kind != HISTOGRAM:
        if index:
            earlier = tile - tiles
            before = packed[ends[earlier - 1] if earlier else 0 : ends[earlier]]
            _add(kind, span, bins, index - 1, NEXT, before, sums)
        if index == bins - 1:
            _add(kind, span, bins, index, NEXT, own, sums)
    return own, before


@_compiled
def add_tiles(kind: int, span: int, bins: int, ends: Any, packed: Any, out: Any) -> None:
    """Sum sorted events into `out`, (channels, height * width) float32."""
    sums = np.zeros(TILE)
    for channel in range(ends.shape[0]):
        for number in range(ends.shape[1]):
            own, before = _add_tile(kind, span, bins, channel * ends.shape[1] + number, ends, packed, sums)
            part = out[channel, number << SHIFT : number + 1 << SHIFT]
            if 4 * (len(own) + len(before)) > TILE:
                for pixel in range(len(part)):
                    part[pixel] = sums[pixel]
                sums[:] = 0
                continue
            part[:] = 0
            for events in (own, before):
                for event in events:
                    part[event >> 1 & TILE - 1] = sums[event >> 1 & TILE - 1]
            for events in (own, before):
                for event in events:
                    sums[event >> 1 & TILE - 1] = 0


@_compiled
def add_tiles_sparse(
    kind: int, span: int, bins: int, ends: Any, packed: Any, least: float, marks: Any, values: Any
) -> tuple[int, float]:
    """Sum sorted events; returns how many sums are not below `least`, and the range of these.

    Args:
        least: a smaller sum counts as zero.
        marks: (channels * tiles, TILE / 64) uint64 of zeros: filled with a bit for each pixel that is not zero.
        values: filled with their sums, in the order of the pixels.
    """
    sums, count = np.zeros(TILE), 0
    smallest, largest = math.inf, -math.inf
    for tile in range(len(marks)):
        own, before = _add_tile(kind, span, bins, tile, ends, packed, sums)
        mark = marks[tile]
        for events in (own, before):
            for event in events:
                mark[event >> 7 & (TILE >> 6) - 1] |= np.uint64(1) << np.uint64(event >> 1 & 63)
        for word in range(len(mark)):
            bits, kept = mark[word], np.uint64(0)
            while bits:
                bit = _lowest(bits)
                bits &= bits - np.uint64(1)
                pixel = word << 6 | np.int64(bit)
                value = sums[pixel]
                sums[pixel] = 0
                if abs(value) >= least:
                    values[count] = value
                    count += 1
                    kept |= np.uint64(1) << bit
                    smallest, largest = min(smallest, value), max(largest, value)
            mark[word] = kept
    return count, largest - smallest if count else 0.0


@_compiled
def subtract(values: Any, mean: float, squares: Any) -> None:
    """Subtract the mean from values, and fill `squares` with the squares of the result."""
    for index in range(len(values)):
        values[index] -= mean
        squares[index] = values[index] * values[index]


@_compiled
def expand_tiles(marks: Any, values: Any, divisor: float, out: Any) -> None:
    """Write the sums of `add_tiles_sparse`, divided, into `out`, (channels, height * width) float32."""
    tiles, count = len(marks) // len(out), 0
    for tile in range(len(marks)):
        number = tile % tiles
        part = out[tile // tiles, number << SHIFT : number + 1 << SHIFT]
        part[:] = 0
        for word in range(marks.shape[1]):
            bits = marks[tile, word]
            while bits:
                part[word << 6 | np.int64(_lowest(bits))] = values[count] / divisor
                bits &= bits - np.uint64(1)
                count += 1
