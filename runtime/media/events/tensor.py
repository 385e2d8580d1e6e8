"""The events of one window as a tensor.

Time runs from the first event, 0, to the last, 1; an event at time s weighs on the bins of its pixel

    voxel_grid    max(0, 1 - |b - (B - 1) s|)    bins b = 0 to B - 1; Zhu et al. 2019, Rebecq et al. 2019 (E2VID)
    event_volume  as above with B s - 1/2, and what falls outside, see `_volume_bins`; OpenEB
    histogram     1 in bin floor(B s), the last event in the last; as stacked by RVT (Gehrig et al. 2023)

times +1 or -1 (polarity "signed") or in channels of its polarity ("split").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stepcell.event_spec import EventSpec
from stepcell.runtime.media.events.events import Events

__all__ = ["event_tensor"]

_ROUNDING = 1e-9  # what is left where events of both polarities cancel each other
Floats = NDArray[np.float64]
Microseconds = NDArray[np.int64]
Bins = list[tuple[NDArray[np.int64], Floats]]  # bin and weight of every event


def event_tensor(events: Events, spec: EventSpec, height: int, width: int) -> NDArray[np.float32]:
    """(channels, height, width); zeros where there is no event.

    Sums are taken in float64 in the order of the events, so the same events give the same bits.

    Args:
        events: of one window, in order of time, all on the sensor.
    """
    shape = (spec.channels, height, width)
    if not len(events):
        return np.zeros(shape, np.float32)
    time, span = events.t - events.t[0], max(1, int(events.t[-1] - events.t[0]))
    pixel = events.y.astype(np.int64) * width + events.x
    if spec.polarity == "split":
        sign, offset = np.ones(len(events)), np.where(events.p, spec.bins, 0)
    else:
        sign, offset = np.where(events.p, 1.0, -1.0), np.zeros(len(events), np.int64)
    share = {"voxel_grid": _grid_bins, "event_volume": _volume_bins, "histogram": _count_bins}[spec.representation]
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


def _grid_bins(time: Microseconds, span: int, count: int) -> Bins:
    place = time * (count - 1) / span
    lower = np.minimum(place.astype(np.int64), count - 1)
    above = place - lower
    return [(lower, 1 - above), (np.minimum(lower + 1, count - 1), above)]


def _volume_bins(time: Microseconds, span: int, count: int) -> Bins:
    """OpenEB's event_volume: bins have their centres at 1/2, 3/2, ... of a bin.

    The models were trained with its ends: in the first half bin what the first bin does not take
    goes to the second, in the last one all stays in the last.
    """
    place = time * count / span - 0.5
    lower = np.clip(np.floor(place).astype(np.int64), 0, count - 1)
    weight = np.maximum(0, 1 - np.abs(lower - place))
    return [(lower, weight), (np.minimum(lower + 1, count - 1), 1 - weight)]


def _count_bins(time: Microseconds, span: int, count: int) -> Bins:
    return [(np.minimum(time * count // span, count - 1), np.ones(len(time)))]


def _normalised(values: Floats) -> Floats:
    """Mean 0 and standard deviation 1 of the values that are not zero, as E2VID takes them (Rebecq et al. 2019).

    Values that are all alike have no deviation, and are left as they are.
    """
    zero = np.abs(values) < _ROUNDING
    others = values[~zero]
    if not len(others) or np.ptp(others) < _ROUNDING:
        return np.where(zero, 0, values)
    return np.where(zero, 0, (values - others.mean()) / others.std())
