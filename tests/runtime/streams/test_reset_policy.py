"""When a stream forgets, and how NaN is found."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import InputError
from stepcell.runtime.streams.reset_policy import ResetPolicy, ResetWatch, non_finite, non_finite_rows, reset_on_signal

GREY = np.zeros((8, 8, 3), np.uint8)


def scene(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def test_every_n_frames() -> None:
    watch = ResetWatch(ResetPolicy(every=3))
    assert [number for number in range(10) if watch.due(number, GREY, None)] == [3, 6, 9]


def test_a_gap_in_time_or_a_step_back() -> None:
    watch = ResetWatch(ResetPolicy(gap=0.5))
    times = [10.0, 10.1, 10.6, 11.11, 11.2, 3.0, 3.4, 3.4]
    found = [watch.due(number, GREY, seconds) for number, seconds in enumerate(times)]
    assert found == [None, None, None, "gap", None, "gap", None, None]


def test_a_gap_needs_times() -> None:
    watch = ResetWatch(ResetPolicy(gap=1.0))
    with pytest.raises(InputError, match="frame 7: has no time"):
        watch.due(7, GREY, None)


def test_a_cut() -> None:
    watch = ResetWatch(ResetPolicy(cut=True))
    frames = [scene(0), scene(0), scene(1), scene(1)]
    assert [watch.due(number, frame, None) for number, frame in enumerate(frames)] == [None, None, "cut", None]


def test_one_frame_resets_once_and_says_the_strongest_cause() -> None:
    watch = ResetWatch(ResetPolicy(every=2, gap=1.0, cut=True))
    watch.due(0, scene(0), 0.0)
    watch.due(1, scene(0), 0.1)
    watch.demand()
    assert watch.due(2, scene(1), 9.0) == "demand"
    assert watch.due(3, scene(1), 9.1) is None, "the others have seen that frame too"
    assert watch.due(4, scene(2), 19.0) == "gap"
    assert watch.due(5, scene(2), 19.1) is None
    assert watch.due(6, scene(3), 19.2) == "cut"
    assert watch.due(7, scene(3), 19.3) is None
    assert watch.due(8, scene(3), 19.4) == "every"


def test_a_signal_demands_a_reset_of_all_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    first, second = ResetWatch(ResetPolicy()), ResetWatch(ResetPolicy())
    watches = [first]
    with reset_on_signal(watches):
        watches.append(second)  # a stream that was opened later
        signal.raise_signal(signal.SIGUSR1)
    assert first.due(1, GREY, None) == second.due(5, GREY, None) == "demand"
    assert first.due(2, GREY, None) is None
    assert signal.getsignal(signal.SIGUSR1) == before


def test_non_finite_outputs_and_rows_of_states() -> None:
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=("batch",)),),
        outputs=(),
        states=(StateSpec(name="h", shape=("batch", 2)), StateSpec(name="c", shape=(2, "batch"), batch_axis=1)),
    )
    states = {"h": np.zeros((4, 2), np.float16), "c": np.zeros((2, 4), np.float32)}
    assert non_finite(states) is None
    assert non_finite_rows(contract, states) == {}
    states["h"][2, 1] = np.inf
    states["c"][0, 3] = np.nan
    states["c"][1, 2] = -np.inf
    assert non_finite(states) == "h"
    assert non_finite_rows(contract, states) == {2: "h", 3: "c"}
    assert non_finite({"labels": np.zeros(3, np.int64)}) is None
