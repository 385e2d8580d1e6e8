"""Deadline: which frames are late, and whether they are dropped or stepped."""

from __future__ import annotations

import time

import numpy as np

from stepcell.runtime.streams.deadline import Deadline, LateFrames
from stepcell.runtime.streams.frame_reader import Frame


def frame(age: float) -> Frame:
    return Frame(np.zeros(1), None, time.monotonic() - age, 0.0, 0)


def test_late_frames_are_dropped_and_counted() -> None:
    late = LateFrames(Deadline(1.0))
    assert [late.drop(frame(age)) for age in (0.0, 2.0, 0.1, 5.0)] == [False, True, False, True]
    assert (late.dropped, late.stepped, late.drop_oldest) == (2, 0, True)


def test_late_frames_are_stepped_and_counted_if_the_source_is_blocked() -> None:
    late = LateFrames(Deadline(1.0, "block"))
    assert not any(late.drop(frame(age)) for age in (0.0, 2.0, 5.0))
    assert (late.dropped, late.stepped, late.drop_oldest) == (0, 2, False)


def test_without_a_deadline_no_frame_is_late() -> None:
    late = LateFrames(None)
    assert not late.drop(frame(1e9))
    assert (late.dropped, late.stepped, late.drop_oldest) == (0, 0, False)
