"""Reset policy: which frames reset the states of a stream."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.streams.reset_policy import ResetMonitor, ResetPolicy

GREY = np.zeros((8, 8, 3), np.uint8)


def scene(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def test_every_n_frames() -> None:
    monitor = ResetMonitor(ResetPolicy(every=3))
    assert [number for number in range(10) if monitor.due(number, GREY, None)] == [3, 6, 9]


def test_a_gap_in_time_or_a_step_back() -> None:
    monitor = ResetMonitor(ResetPolicy(gap=0.5))
    times = [10.0, 10.1, 10.6, 11.11, 11.2, 3.0, 3.4, 3.4]
    found = [monitor.due(number, GREY, seconds) for number, seconds in enumerate(times)]
    assert found == [None, None, None, "gap", None, "gap", None, None]


def test_a_gap_needs_times() -> None:
    monitor = ResetMonitor(ResetPolicy(gap=1.0))
    with pytest.raises(InputError, match="frame 7: has no timestamp"):
        monitor.due(7, GREY, None)


def test_a_cut() -> None:
    monitor = ResetMonitor(ResetPolicy(cut=True))
    frames = [scene(0), scene(0), scene(1), scene(1)]
    assert [monitor.due(number, frame, None) for number, frame in enumerate(frames)] == [None, None, "cut", None]


def test_one_frame_resets_once_and_says_the_strongest_cause() -> None:
    monitor = ResetMonitor(ResetPolicy(every=2, gap=1.0, cut=True))
    monitor.due(0, scene(0), 0.0)
    monitor.due(1, scene(0), 0.1)
    monitor.demand()
    assert monitor.due(2, scene(1), 9.0) == "demand"
    assert monitor.due(3, scene(1), 9.1) is None, "the others have seen that frame too"
    assert monitor.due(4, scene(2), 19.0) == "gap"
    assert monitor.due(5, scene(2), 19.1) is None
    assert monitor.due(6, scene(3), 19.2) == "cut"
    assert monitor.due(7, scene(3), 19.3) is None
    assert monitor.due(8, scene(3), 19.4) == "every"


def test_a_reconnection_resets_unless_a_gap_is_given() -> None:
    for gap, expected in ((None, "gap"), (60.0, None)):
        monitor = ResetMonitor(ResetPolicy(gap=gap))
        found = [monitor.due(number, GREY, float(number), int(number > 2)) for number in range(5)]
        assert found == [None, None, None, expected, None]


def test_the_first_frame_never_resets() -> None:
    monitor = ResetMonitor(ResetPolicy(every=1, cut=True))
    monitor.demand()
    assert monitor.due(0, GREY, None, 1) is None
    assert monitor.due(1, GREY, None, 1) == "every"
