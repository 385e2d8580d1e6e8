"""Event tensor: the events of one window, accumulated per pixel and time bin.

Time s is 0 at the first event of the window and 1 at the last. An event adds to bin b = 0 ... B - 1 of its pixel

    voxel_grid    max(0, 1 - |b - (B - 1) s|); Zhu et al. 2019, Rebecq et al. 2019 (E2VID)
    event_volume  max(0, 1 - |b - (B s - 1/2)|), at both ends as in `_volume_bins`; OpenEB
    tonic's grid  max(0, 1 - |b - B s|), for b = B nothing: the last event is dropped
    histogram     1 in bin floor(B s), the last event in bin B - 1; stacked histogram of RVT (Gehrig et al. 2023)

with the sign of its polarity ("signed"), or in the channels of its polarity ("split").
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.event_spec import EventSpec
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.compiled import compiled_loops

__all__ = ["event_tensor"]

_ROUNDING = 1e-9  # rounding error left where events of both polarities cancel
Floats = NDArray[np.float64]
Microseconds = NDArray[np.int64]
Bins = list[tuple[NDArray[np.int64], Floats]]  # bin and weight of each event


def event_tensor(events: Events, spec: EventSpec, height: int, width: int) -> NDArray[np.float32]:
    """Tensor (channels, height, width) of a window; zero where there is no event.

    Accumulated in float64 in the order of the events, so the result is reproducible bit by bit.

    Args:
        events: events of one window, in order of time, all on the sensor.
        spec: representation, bins, polarity and normalisation.
        height: height of the sensor in pixels.
        width: width of the sensor in pixels.

    Raises:
        InputError: an event is outside the sensor, or earlier than the one before it.
    """
    shape = (spec.channels, height, width)
    if not len(events):
        return np.zeros(shape, np.float32)
    for column, side in ((events.x, width), (events.y, height)):
        if column.max() >= side or (column.dtype.kind != "u" and column.min() < 0):
            raise InputError(f"events: expected pixels of a sensor of {width}x{height}, got others")
    events = Events.of(events.x, events.y, events.p, events.t)
    if (events.t[1:] < events.t[:-1]).any():
        raise InputError("events: expected the order of time, got an event that is earlier than the one before it")
    loops = compiled_loops()
    if loops is not None and not spec.convention and events.t[-1] - events.t[0] < loops.LONGEST_SPAN:
        return _compiled(loops, events, spec, height * width, width).reshape(shape)
    time, span = events.t - events.t[0], max(1, int(events.t[-1] - events.t[0]))
    pixel = events.y.astype(np.int64) * width + events.x
    if spec.polarity == "split":
        sign, offset = np.ones(len(events)), np.where(events.p, spec.bins, 0)
    else:
        sign, offset = np.where(events.p, 1.0, -1.0), np.zeros(len(events), np.int64)
    grid = _tonic_bins if spec.convention else _grid_bins
    share = {"voxel_grid": grid, "event_volume": _volume_bins, "histogram": _count_bins}[spec.representation]
    places, weights = [], []
    for bins, weight in share(time, span, spec.bins):
        places.append((bins + offset) * (height * width) + pixel)
        weights.append(weight * sign)
    length = height * width * spec.channels
    sums = np.bincount(np.concatenate(places), np.concatenate(weights), minlength=length).astype(np.float64, copy=False)
    filled = np.flatnonzero(sums)
    tensor = np.zeros(length, np.float32)
    tensor[filled] = _normalised(sums[filled]) if spec.normalise else sums[filled]
    return tensor.reshape(shape)


def _compiled(loops: ModuleType, events: Events, spec: EventSpec, size: int, width: int) -> NDArray[np.float32]:
    """The tensor, (channels, size), by the loops that numba compiles."""
    kind, bins, span = loops.KINDS[spec.representation], spec.bins, max(1, int(events.t[-1] - events.t[0]))
    ends = np.zeros((spec.channels, -(-size // loops.TILE)), np.int64)
    packed = np.empty(len(events), np.int64)
    columns = (events.x, events.y, events.p, events.t)
    loops.sort_by_tile(kind, *columns, width, bins, spec.polarity == "split", ends, packed)
    tensor = np.empty((spec.channels, size), np.float32)
    if not spec.normalise:
        loops.add_tiles(kind, span, bins, ends, packed, tensor)
        return tensor
    marks = np.zeros((ends.size, loops.TILE // 64), np.uint64)
    values = np.empty(2 * len(events) + 1)
    count, spread = loops.add_tiles_sparse(kind, span, bins, ends, packed, _ROUNDING, marks, values)
    deviation = 1.0
    if count and spread >= _ROUNDING:
        others, squares = values[:count], np.empty(count)
        loops.subtract(others, others.mean(), squares)
        deviation = float(np.sqrt(squares.mean()))
    loops.expand_tiles(marks, values, deviation, tensor)
    return tensor


def _grid_bins(time: Microseconds, span: int, count: int) -> Bins:
    place = time * (count - 1) / span
    lower = np.minimum(place.astype(np.int64), count - 1)
    above = place - lower
    return [(lower, 1 - above), (np.minimum(lower + 1, count - 1), above)]


def _tonic_bins(time: Microseconds, span: int, count: int) -> Bins:
    """The bins of tonic 1.7.0's `to_voxel_grid_numpy`: what is beyond the last one is dropped."""
    place = time * count / span
    lower = place.astype(np.int64)
    above = place - lower
    return [
        (np.minimum(bins, count - 1), np.where(bins < count, weight, 0.0))
        for bins, weight in ((lower, 1 - above), (lower + 1, above))
    ]


def _volume_bins(time: Microseconds, span: int, count: int) -> Bins:
    """OpenEB's event_volume: the centres of the bins are at 1/2, 3/2, ... bins.

    At the ends it follows OpenEB's code, which the models were trained with: in the first half bin, the share that
    bin 0 does not receive goes to bin 1; in the last half bin, bin B - 1 receives all.
    """
    place = time * count / span - 0.5
    lower = np.clip(np.floor(place).astype(np.int64), 0, count - 1)
    weight = np.maximum(0, 1 - np.abs(lower - place))
    return [(lower, weight), (np.minimum(lower + 1, count - 1), 1 - weight)]


def _count_bins(time: Microseconds, span: int, count: int) -> Bins:
    return [(np.minimum(time * count // span, count - 1), np.ones(len(time)))]


def _normalised(values: Floats) -> Floats:
    """Mean 0 and standard deviation 1 over the non-zero values, as for E2VID (Rebecq et al. 2019).

    Values that are all equal have no deviation and are returned unchanged.
    """
    zero = np.abs(values) < _ROUNDING
    others = values[~zero]
    if not len(others) or np.ptp(others) < _ROUNDING:
        return np.where(zero, 0, values)
    return np.where(zero, 0, (values - others.mean()) / others.std())
