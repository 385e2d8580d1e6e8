"""Latency statistics against the percentiles of numpy."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcell.runtime.loop.latency import Latency, Stopwatch

DURATIONS = st.lists(st.floats(1e-6, 1000.0), min_size=1, max_size=300)


@given(DURATIONS, st.sampled_from([1, 50, 90, 95, 99, 100]))
def test_percentiles_are_within_half_a_percent_of_numpy(durations: list[float], q: int) -> None:
    latency = Latency()
    for seconds in [5.0, *durations]:
        latency.add(seconds)
    expected = float(np.percentile(durations, q, method="inverted_cdf"))
    assert latency.percentile(q) == pytest.approx(expected, rel=0.005)
    assert latency.mean == pytest.approx(np.mean(durations))
    summary = latency.summary()
    assert summary.count == len(durations)
    assert summary.first_ms == 5000.0
    assert summary.max_ms == pytest.approx(max(durations) * 1e3, abs=1e-4)


@given(DURATIONS)
def test_percentiles_grow(durations: list[float]) -> None:
    latency = Latency()
    for seconds in [0.0, *durations]:
        latency.add(seconds)
    figures = [latency.percentile(q) for q in range(1, 101)]
    assert figures == sorted(figures)
    assert figures[-1] == max(durations)


@pytest.mark.parametrize("seconds", [0.0, 1e-12, 1e9], ids=str)
def test_extremes_do_not_fail(seconds: float) -> None:
    latency = Latency()
    latency.add(1.0)
    latency.add(seconds)
    assert latency.percentile(50) == seconds


def test_nothing_measured_is_none() -> None:
    latency = Latency()
    assert latency.summary().p50_ms is None
    assert latency.mean is None
    latency.add(0.25)
    assert latency.summary().first_ms == 250.0
    assert latency.summary().mean_ms is None
    assert latency.mean == 0.25


def test_stopwatch_counts_what_succeeded() -> None:
    latency = Latency()
    with Stopwatch(latency):
        time.sleep(0.01)
    with pytest.raises(KeyError), Stopwatch(latency):
        raise KeyError
    assert latency.summary().count == 0
    assert latency.first is not None
    assert latency.first >= 0.01
