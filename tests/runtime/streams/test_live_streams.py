"""Scheduler: cameras, whose frames are late, and which are lost and come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepcell import StepLoop
from stepcell.errors import InputError
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.streams.deadline import Deadline
from stepcell.runtime.streams.reconnect import Reconnect
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource
from tests.runtime.streams.scheduling import ONE, Model, Watched, run, together


def test_late_frames_are_dropped_and_counted_exactly(accumulator: Model, tmp_path: Path) -> None:
    """A live source at 500 frames/s against steps of 20 ms: the report counts every frame that was not stepped."""
    count = 150
    frames = [np.full((3, 4, 4), number, np.float32) for number in range(count)]
    fast = Stream(
        FrameSource("fast", frames, pause=0.002, live=True),
        ArraySink(tmp_path / "fast.npy"),
        deadline=Deadline(0.005),
        reset=ResetPolicy(every=1),  # y = x: the results say which frames were stepped
    )
    slow = Stream(
        FrameSource("slow", [ONE] * 9, pause=0.01), ArraySink(tmp_path / "slow.npy"), deadline=Deadline(0.001)
    )
    reports = together(accumulator(), [fast, slow], watched=Watched(0.02))
    stepped = np.load(tmp_path / "fast.npy")[:, 0, 0, 0]
    dropped = reports[0].dropped
    assert (np.diff(stepped) > 0).all()
    assert len(stepped) == reports[0].frames
    assert reports[0].frames + dropped["late"] + dropped["queue full"] == count
    assert dropped["late"] > 5
    assert dropped["queue full"] > 5
    assert reports[0].late == 0
    # A file is read as fast as it is stepped, so none of its frames is late.
    assert (reports[1].frames, reports[1].dropped) == (9, {"late": 0, "queue full": 0})


def test_late_frames_are_stepped_and_counted_where_the_source_can_wait(accumulator: Model, tmp_path: Path) -> None:
    source = FrameSource("pipe", [ONE] * 40, live=True)
    stream = Stream(source, ArraySink(tmp_path / "out.npy"), deadline=Deadline(0.002, "block"))
    with StepLoop.open(accumulator()) as loop:
        (report,) = run(loop, [stream], watched=Watched(0.005))
    assert (report.frames, report.dropped) == (40, {"late": 0, "queue full": 0})
    assert 30 <= report.late <= 40
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == list(range(1, 41))


@pytest.mark.parametrize(("gap", "resets"), [(None, 1), (60.0, 0), (0.05, 1)])
def test_a_camera_that_came_back_starts_afresh_unless_the_gap_is_short(
    accumulator: Model, tmp_path: Path, gap: float | None, resets: int
) -> None:
    again = iter([InputError("not yet"), InputError("not yet"), FrameSource("cam", [ONE] * 5, live=True)])

    def reopen() -> FrameSource:
        found = next(again, InputError("gone for good"))
        if isinstance(found, InputError):
            raise found
        return found

    camera = Stream(
        FrameSource("cam", [*[ONE] * 4, InputError("cam: cable")], live=True),
        ArraySink(tmp_path / "cam.npy"),
        reset=ResetPolicy(gap=gap),
        reconnect=Reconnect(reopen, 1.0, first=0.05, most=0.1),
    )
    other = Stream(FrameSource("file", [ONE] * 10), ArraySink(tmp_path / "file.npy"))
    reports = together(accumulator(), [camera, other])
    expected = [1, 2, 3, 4, *([1, 2, 3, 4, 5] if resets else [5, 6, 7, 8, 9])]
    assert np.load(tmp_path / "cam.npy")[:, 0, 0, 0].tolist() == expected
    assert (reports[0].reconnects, reports[0].resets["gap"]) == (1, resets)
    assert "lost and not reconnected within 1 s (gone for good)" in (reports[0].error or "")
    assert np.load(tmp_path / "file.npy")[:, 0, 0, 0].tolist() == list(range(1, 11))


def test_a_reconnection_is_a_gap_also_where_its_first_frames_are_dropped(accumulator: Model) -> None:
    again = iter([FrameSource("cam", [ONE] * 40, live=True)])

    def reopen() -> FrameSource:
        if not camera.frames:
            raise InputError("not before a frame was stepped")
        return next(again, FrameSource("cam", [], live=True))

    camera = Stream(
        FrameSource("cam", [ONE] * 40, live=True),
        deadline=Deadline(60.0),
        reconnect=Reconnect(reopen, 1.0, first=0.001, most=0.001),
    )
    with StepLoop.open(accumulator()) as loop:
        (report,) = run(loop, [camera], watched=Watched(0.02))
    assert sum(report.dropped.values()) + report.frames == 80
    assert report.frames < 30
    assert (report.reconnects, report.resets["gap"]) == (1, 1)


def test_frames_that_were_all_late_are_not_called_absent(accumulator: Model) -> None:
    stream = Stream(FrameSource("a", [ONE] * 9, live=True), deadline=Deadline(1e-9))
    with StepLoop.open(accumulator()) as loop:
        (report,) = run(loop, [stream])
    assert report.error == "a: all its 9 frames were dropped"
    assert sum(report.dropped.values()) == 9
