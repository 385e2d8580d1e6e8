"""Event tensors compared with the formulas, evaluated per event and voxel in exact fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import UsageError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events import Events, event_tensor
from stepcell.runtime.media.events.windows import split_windows

WINDOW = EventWindow(size=30_000, unit="us")
KINDS = ("voxel_grid", "event_volume", "histogram")


def spec(kind: str, bins: int = 5, polarity: str = "signed", *, normalise: bool = False) -> EventSpec:
    return EventSpec(representation=kind, bins=bins, polarity=polarity, window=WINDOW, normalise=normalise)  # type: ignore[arg-type]


def some_events(count: int, height: int, width: int, *, seed: int = 0, span: int = 30_000) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, span, count)) + 10**9
    return Events.of(rng.integers(0, width, count), rng.integers(0, height, count), rng.integers(0, 2, count), t)


def weight(kind: str, place: int, time: Fraction, bins: int) -> Fraction:
    """Weight of an event at time 0 to 1 in bin `place`, as in the papers and OpenEB's code."""
    if kind == "voxel_grid":
        return max(Fraction(0), 1 - abs(place - (bins - 1) * time))
    if kind == "histogram":
        return Fraction(place == min(bins - 1, math.floor(bins * time)))
    star = bins * time - Fraction(1, 2)
    left = min(max(math.floor(star), 0), bins - 1)
    right = min(left + 1, bins - 1)
    share = max(Fraction(0), 1 - abs(left - star))
    return share * (place == left) + (1 - share) * (place == right)


def slow(events: Events, wanted: EventSpec, height: int, width: int) -> NDArray[np.float64]:
    sums = {place: Fraction(0) for place in product(range(wanted.channels), range(height), range(width))}
    start, end = int(events.t[0]), int(events.t[-1])
    for x, y, p, t in zip(*(getattr(events, name).tolist() for name in "xypt"), strict=True):
        time = Fraction(t - start, (end - start) or 1)
        for place in range(wanted.bins):
            share = weight(wanted.representation, place, time, wanted.bins)
            if wanted.polarity == "split":
                sums[place + (wanted.bins if p else 0), y, x] += share
            else:
                sums[place, y, x] += share if p else -share
    result = np.array(list(map(float, sums.values()))).reshape(wanted.channels, height, width)
    if wanted.normalise:
        filled = result[result != 0]
        mean = sum(filled) / len(filled)
        deviation = math.sqrt(sum((filled - mean) ** 2) / len(filled))
        if len(set(sums.values()) - {0}) > 1:
            result[result != 0] = (filled - mean) / deviation
    return result


@pytest.mark.parametrize(
    ("kind", "polarity", "bins", "normalise"),
    list(product(KINDS, ("signed", "split"), (1, 2, 5, 10), (False, True))),
)
def test_equals_the_formula(kind: str, polarity: str, bins: int, normalise: bool) -> None:
    wanted = spec(kind, bins, polarity, normalise=normalise)
    for seed, (height, width, count) in enumerate([(7, 9, 400), (3, 2, 1), (5, 4, 2), (16, 11, 60)]):
        events = some_events(count, height, width, seed=seed)
        got, expected = event_tensor(events, wanted, height, width), slow(events, wanted, height, width)
        worst = float(np.abs(got - expected).max())
        assert got.dtype == np.float32
        assert got.shape == (bins * (2 if polarity == "split" else 1), height, width)
        assert worst <= 2e-6, f"{count} events: worst difference {worst:.1e}"


def test_voxel_grid_by_hand() -> None:
    """Three bins over 100 us: an event at 25 us is half in the first and half in the second."""
    x, y = np.array([0, 1, 1, 0]), np.array([0, 0, 0, 1])
    events = Events.of(x, y, np.array([1, 1, 0, 0]), np.array([1000, 1025, 1080, 1100]))
    expected = [
        [[1.0, 0.5], [0.0, 0.0]],
        [[0.0, 0.5 - 0.4], [0.0, 0.0]],
        [[0.0, -0.6], [-1.0, 0.0]],
    ]
    assert event_tensor(events, spec("voxel_grid", 3), 2, 2) == pytest.approx(np.array(expected), abs=1e-6)


def test_histogram_by_hand() -> None:
    zeros = np.zeros(5, np.int64)
    events = Events.of(zeros, zeros, np.array([0, 1, 1, 0, 1]), np.array([0, 49, 50, 99, 100]))
    counts = event_tensor(events, spec("histogram", 2, "split"), 1, 1)
    assert counts[:, 0, 0].tolist() == [1, 1, 1, 2]  # falling early, falling late, rising early, rising late


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_counts_once(kind: str) -> None:
    events = some_events(3000, 24, 32)
    total = float(event_tensor(events, spec(kind, 6, "split"), 24, 32).sum(dtype=np.float64))
    assert total == pytest.approx(3000, abs=1e-3)


def test_normalised_values() -> None:
    events = some_events(3000, 24, 32)
    tensor = event_tensor(events, spec("voxel_grid", normalise=True), 24, 32)
    filled = tensor[event_tensor(events, spec("voxel_grid"), 24, 32) != 0]
    assert abs(filled.mean()) < 1e-5
    assert abs(filled.std() - 1) < 1e-5
    assert np.count_nonzero(tensor) < tensor.size


def test_one_event_alone_and_none() -> None:
    one = some_events(1, 4, 4)
    for kind in KINDS:
        tensor = event_tensor(one, spec(kind, normalise=True), 4, 4)
        assert np.isfinite(tensor).all()
        assert abs(abs(float(tensor.sum())) - 1) < 1e-6  # equal values are not changed
        assert not event_tensor(one[:0], spec(kind, normalise=True), 4, 4).any()


def test_the_same_events_give_the_same_bits() -> None:
    events = some_events(20_000, 60, 80)
    for kind in KINDS:
        first, second = (event_tensor(events, spec(kind, normalise=True), 60, 80) for _ in range(2))
        assert first.tobytes() == second.tobytes()


def in_parts(events: Events, seed: int) -> Iterator[Events]:
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(events), 30))
    for start, stop in zip([0, *cuts], [*cuts, len(events)], strict=True):
        yield events[start:stop]


@pytest.mark.parametrize("seed", range(4))
def test_windows_by_time(seed: int) -> None:
    events = some_events(2000, 4, 4, seed=seed)
    t = events.t + np.where(np.arange(2000) < 900, 0, 10_000)  # a pause without events
    events = Events(events.x, events.y, events.p, t)
    found = list(split_windows(in_parts(events, seed), EventWindow(size=1000, unit="us"), 16))
    for number, (part, end) in enumerate(found):
        start = t[0] + number * 1000
        assert end == start + 1000
        assert np.array_equal(part.t, t[(t >= start) & (t < end)]), f"window {number}"
    assert sum(len(part) for part, _ in found) == 2000
    assert sum(len(part) == 0 for part, _ in found) >= 9
    assert found[-1][0].t[-1] == t[-1]


@pytest.mark.parametrize("window", [EventWindow(size=300, unit="events"), EventWindow(size=18.75, unit="events/pixel")])
def test_windows_by_count(window: EventWindow) -> None:
    events = some_events(2000, 4, 4)
    found = list(split_windows(in_parts(events, 1), window, 16))
    assert [len(part) for part, _ in found] == [300] * 6
    for number, (part, end) in enumerate(found):
        assert np.array_equal(part.t, events.t[number * 300 : number * 300 + 300])
        assert end == part.t[-1]
    assert list(split_windows([events[:299]], window, 16)) == []


@pytest.mark.parametrize(
    ("text", "size", "unit"),
    [
        ("5000us", 5000, "us"),
        ("30ms", 30_000, "us"),
        ("33.33ms", 33_330, "us"),
        ("2s", 2_000_000, "us"),
        ("15000events", 15_000, "events"),
        ("0.35events/pixel", 0.35, "events/pixel"),
    ],
)
def test_window_as_text(text: str, size: float, unit: str) -> None:
    assert EventWindow.parse(text) == EventWindow(size=size, unit=unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "30", "ms", "0ms", "0.0001ms", "-5us", "1.5events", "0events/pixel", "5 us", "1e3us", "9" * 400 + "ms"],
)
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a time or a number of events"):
        EventWindow.parse(text)


def test_tonics_grid() -> None:
    """As `to_voxel_grid_numpy` of tonic 1.7.0 returned it: other bins than E2VID, and the last event dropped."""
    tonic = msgspec.structs.replace(spec("voxel_grid"), convention="tonic")
    columns = ([0, 1, 2, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 500, 1000, 850])
    order = np.argsort(columns[3], kind="stable")
    events = Events.of(*(np.array(column)[order] for column in columns))
    grid = event_tensor(events, tonic, 1, 3)[:, 0]
    assert pytest.approx(np.array([[1, 0, 0, 0, 0.75], [0, 0, -0.5, -0.5, 0], [0, 0, 0, 0, 0]])) == grid.T
    assert event_tensor(events[:1], tonic, 1, 3)[:, 0, 0].tolist() == [1, 0, 0, 0, 0]
    halves = msgspec.structs.replace(tonic, polarity="split")
    assert event_tensor(events, halves, 1, 3)[:, 0, 1].tolist() == [0, 0, 0.5, 0.5, 0] + [0] * 5
