"""Scheduler: slow steps and outputs, bounded queues, and runs that are stopped."""

from __future__ import annotations

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
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.frame_reader import DEPTH
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource
from tests.runtime.streams.scheduling import ONE, Model, Watched, run, together


@pytest.mark.parametrize("slow", ["step", "write"])
def test_queues_are_bounded(accumulator: Model, tmp_path: Path, slow: str) -> None:
    class Slow(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            time.sleep(0.003)
            super().write(frame)

    source = FrameSource("a", [ONE] * 120)
    sink = (Slow if slow == "write" else ArraySink)(tmp_path / "a.npy")
    ahead: list[int] = []

    class Ahead(Watched):
        def frame(self, stream: Stream, seconds: float) -> None:
            super().frame(stream, seconds)
            ahead.append(source.read - stream.frames)

    watched = Ahead(0.003 if slow == "step" else 0.0)
    with StepLoop.open(accumulator()) as loop:
        (report,) = run(loop, [Stream(source, sink)], watched)
    assert report.frames == 120
    assert DEPTH <= watched.most <= 2 * DEPTH
    assert max(ahead) <= DEPTH + 1


def test_a_slow_output_holds_up_its_own_stream_only(accumulator: Model, tmp_path: Path) -> None:
    gate = threading.Event()

    class Stuck(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            gate.wait(10)
            super().write(frame)

    class Opening(Watched):
        def progress(self, run: RunProgress) -> None:
            if run.streams[1].frames == 50:
                gate.set()

    streams = [
        Stream(FrameSource("stuck", [ONE] * 50), Stuck(tmp_path / "stuck.npy")),
        Stream(FrameSource("free", [ONE] * 50), ArraySink(tmp_path / "free.npy")),
    ]
    started = time.monotonic()
    reports = together(accumulator(), streams, watched=Opening())
    assert time.monotonic() - started < 9, "the free stream had to wait"
    assert [report.frames for report in reports] == [50, 50]
    for name in ("stuck", "free"):
        assert np.load(tmp_path / f"{name}.npy")[:, 0, 0, 0].tolist() == list(range(1, 51))


def test_an_output_that_is_stuck_is_not_waited_for_in_every_step(
    accumulator: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepcell.runtime.streams.scheduler.GATHER_SECONDS", 20.0)
    gate = threading.Event()

    class Stuck(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            gate.wait(60)
            super().write(frame)

    class Opening(Watched):
        def progress(self, run: RunProgress) -> None:
            if run.streams[1].frames == 12:
                gate.set()

    streams = [
        Stream(FrameSource("stuck", [ONE] * 12), Stuck(tmp_path / "stuck.npy")),
        Stream(FrameSource("free", [ONE] * 12), ArraySink(tmp_path / "free.npy")),
    ]
    started = time.monotonic()
    reports = together(accumulator(), streams, watched=Opening())
    assert time.monotonic() - started < 15
    assert [report.frames for report in reports] == [12, 12]


def test_a_stop_is_noticed_while_the_first_frames_are_waited_for(
    accumulator: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepcell.runtime.streams.scheduler.GATHER_FIRST_SECONDS", 30.0)
    control, gate = RunControl(), threading.Event()

    class Silent(FrameSource):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            time.sleep(0.5)  # by now the frame of the other stream waits for one of this stream
            control.stop()  # notifies no condition
            gate.wait(60)
            return iter(())

    streams = [Stream(FrameSource("a", [ONE])), Stream(Silent("b", [], live=True))]
    started = time.monotonic()
    reports = together(accumulator(), streams, control=control)
    assert time.monotonic() - started < 20
    gate.set()
    assert {report.stopped for report in reports} == {"interrupted"}


def test_a_stop_finishes_every_output(accumulator: Model, tmp_path: Path) -> None:
    control = RunControl()

    class Stopping(Watched):
        def frame(self, stream: Stream, seconds: float) -> None:
            if stream.name == "b" and stream.frames == 7:
                control.stop()

    names = ["a.npy", "b.mp4", "c"]
    sources = [FrameSource(name[0], [ONE] * 1000) for name in names]
    streams = [
        Stream(source, open_sink(str(tmp_path / name), Fraction(25)))
        for source, name in zip(sources, names, strict=True)
    ]
    reports = together(accumulator(range=(0.0, 1.0)), streams, control=control, watched=Stopping())
    assert all(report.stopped == "interrupted" and report.error is None for report in reports)
    found = [len(np.load(tmp_path / "a.npy")), *(len(list(open_source(str(tmp_path / n)))) for n in names[1:])]
    assert found == [report.frames for report in reports]
    assert found[1] == 7
    assert all(source.closed for source in sources)


def test_an_abort_leaves_every_output_behind_that_hangs(accumulator: Model, tmp_path: Path) -> None:
    gate, control = threading.Event(), RunControl()

    class Stuck(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            gate.wait(60)

    streams = [Stream(FrameSource(name, [ONE] * 3), Stuck(tmp_path / f"{name}.npy")) for name in "ab"]
    for seconds, request in ((0.5, control.stop), (1.0, control.abort)):
        threading.Timer(seconds, request).start()
    started = time.monotonic()
    reports = together(accumulator(), streams, control=control)
    assert 1.0 < time.monotonic() - started < 20
    gate.set()
    assert [report.written for report in reports] == [0, 0]
    for name, report in zip("ab", reports, strict=True):
        assert report.error == f"{tmp_path / name}.npy: not finished when the run was aborted"
