"""Scheduler: an input, an output, a frame or a device fails, and the other streams go on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import DeviceError, InputError, OutputError
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.streams.frame_converter import ConvertedFrame
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource
from tests.runtime.streams.scheduling import ONE, Model, run, together


def test_one_that_breaks_does_not_stop_the_others(
    accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    nan = np.full_like(ONE, np.nan)
    clips: list[list[Any]] = [
        [ONE] * 20,
        [ONE] * 3 + [InputError("b: broken at frame 3")] + [ONE] * 3,
        [ONE] * 5 + [nan, ONE],
        [ONE] * 2 + [np.ones((3, 8, 8), np.float32)],
        [np.ones((3, 8, 8), np.float32)] * 3,
        [],
    ]
    names = "abcdef"
    streams = [
        Stream(FrameSource(name, clip), ArraySink(tmp_path / f"{name}.npy"))
        for name, clip in zip(names, clips, strict=True)
    ]
    reports = together(accumulator(), streams)
    assert [report.frames for report in reports] == [20, 3, 5, 2, 0, 0]
    assert [stream.failure is not None for stream in streams] == [False, True, True, True, True, True]
    errors = [
        "",
        "broken at frame 3",
        "c: frame 5: x: 48 of 48 values are NaN",
        "d: frame 2 is (3, 8, 8), the first one (3, 4, 4)",
        "e: its input has shape",
        "f: holds no",
    ]
    for report, words in zip(reports, errors, strict=True):
        assert words in (report.error or "")
        assert report.stopped == ("error" if words else "end of input")
    for name, count in zip("abcd", (20, 3, 5, 2), strict=True):
        assert np.load(tmp_path / f"{name}.npy")[:, 0, 0, 0].tolist() == list(range(1, count + 1))
    assert "stream ended: b: broken at frame 3" in logged.text
    assert not (tmp_path / "e.npy").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_fails_stops_its_stream_only(accumulator: Model, tmp_path: Path) -> None:
    class Full(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            if frame[0, 0, 0] == 4:
                raise OutputError("full: cannot be written (No space left on device)")
            super().write(frame)

    streams = [
        Stream(FrameSource("a", [ONE] * 30), Full(tmp_path / "a.npy")),
        Stream(FrameSource("b", [ONE] * 30), ArraySink(tmp_path / "b.npy")),
        Stream(FrameSource("c", [ONE] * 30), open_sink(str(tmp_path / "c.mp4"), Fraction(25))),
    ]
    reports = together(accumulator(range=(0.0, 1.0)), streams)
    assert "No space left on device) (" + str(tmp_path / "a.npy") + " holds the first 3 of " in (reports[0].error or "")
    assert reports[0].written == len(np.load(tmp_path / "a.npy")) == 3
    assert [(report.frames, report.written) for report in reports[1:]] == [(30, 30), (30, 30)]
    assert len(np.load(tmp_path / "b.npy")) == len(list(open_source(str(tmp_path / "c.mp4")))) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", "c.mp4", "sum.onnx"]


def test_a_source_that_breaks_while_it_is_asked_is_no_end_of_input(accumulator: Model) -> None:
    gate = threading.Event()

    class Breaking(FrameSource):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            yield ONE
            gate.wait(10)
            raise InputError("broken")

    with StepLoop.open(accumulator()) as loop:
        stream = Stream(Breaking("a", []))
        stream.begin(loop.contract, loop.contract.inputs[0], threading.Condition())
    assert stream.incoming.reader is not None
    assert stream.incoming.converter is not None
    take, thread = stream.incoming.converter.take, stream.incoming.reader._thread

    def slowly() -> ConvertedFrame | None:
        frame = take()
        if frame is None:  # fails before the converter is asked again
            gate.set()
            thread.join()
        return frame

    stream.incoming.converter.take = slowly  # type: ignore[method-assign]
    while not stream.ready:
        time.sleep(0.001)
    assert stream.take()
    stream.step_begins()
    stream.deliver({})
    assert not stream.take()
    assert stream.stopped is None
    with pytest.raises(InputError, match="broken"):
        stream.take()


def test_an_output_that_fails_is_noticed_while_the_input_is_silent(accumulator: Model) -> None:
    read_end, write_end = os.pipe()

    class Full:
        name, takes_pixels, replaces = "full", False, False

        def write(self, frame: NDArray[Any]) -> None:
            raise OutputError("full: cannot be written (No space left on device)")

        def close(self) -> None: ...

        def salvage(self) -> int:
            return 0

        def abandon(self) -> None: ...

    os.write(write_end, bytes(4 * 4 * 3))
    with os.fdopen(read_end, "rb") as pipe, StepLoop.open(accumulator()) as loop:
        stream = Stream(RawSource(pipe, (4, 4), 3), Full())
        started = time.monotonic()
        run(loop, [stream])
        assert time.monotonic() - started < 5
        os.close(write_end)
        assert stream.incoming.reader is not None
        stream.incoming.reader.join()
    assert isinstance(stream.failure, OutputError)


def test_a_device_that_fails_ends_every_stream(accumulator: Model, tmp_path: Path) -> None:
    streams = [Stream(FrameSource(name, [ONE] * 9), ArraySink(tmp_path / f"{name}.npy")) for name in "ab"]
    with StepLoop.open(accumulator(), slots=2) as loop:
        step = loop.step_slots_async
        steps: list[Any] = []

        def failing(frames: Any) -> Any:
            steps.append(frames)
            if len(steps) > 4:
                raise DeviceError("gone")
            return step(frames)

        loop.step_slots_async = failing  # type: ignore[method-assign]
        reports = run(loop, streams)
    for name, report in zip("ab", reports, strict=True):
        assert report.error == f"gone ({tmp_path / name}.npy holds the {report.frames} frames before it)"
    assert all(stream.failure is not None and stream.failure.exit_code == 6 for stream in streams)
    for name, report in zip("ab", reports, strict=True):
        assert len(np.load(tmp_path / f"{name}.npy")) == report.frames > 0


def test_nan_in_one_stream_stays_there(accumulator: Model, tmp_path: Path) -> None:
    bad = np.full_like(ONE, 3e38)  # finite, but its double is not
    policies = ["ignore", "reset", "stop", "stop"]
    clips = [[bad] * 6, [ONE, bad, bad, ONE], [ONE, bad, bad, ONE], [ONE] * 6]
    streams = [
        Stream(
            FrameSource(str(number), clip),
            ArraySink(tmp_path / f"{number}.npy"),
            reset=ResetPolicy(on_nonfinite=policy),  # type: ignore[arg-type]
        )
        for number, (clip, policy) in enumerate(zip(clips, policies, strict=True))
    ]
    reports = together(accumulator(), streams)
    assert [report.frames for report in reports] == [6, 4, 2, 6]
    assert [report.non_finite for report in reports] == [0, 1, 1, 0]
    assert [report.resets["non-finite"] for report in reports] == [0, 1, 0, 0]
    assert np.isinf(np.load(tmp_path / "0.npy")[-1]).all()
    assert np.load(tmp_path / "1.npy")[:, 0, 0, 0].tolist() == np.float32([1, 3e38, 3e38, 3e38]).tolist()
    assert np.load(tmp_path / "3.npy")[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert "2: frame 2: y: the model returned NaN or Inf" in (reports[2].error or "")
