"""Scheduler: several streams in one loop, of which one is slow, lost or broken."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import DeviceError, InputError, OutputError, StateError
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.streams.deadline import Deadline
from stepcell.runtime.streams.frame_converter import ConvertedFrame
from stepcell.runtime.streams.frame_reader import DEPTH
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.reconnect import Reconnect
from stepcell.runtime.streams.report import StreamReport
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.run_snapshots import SnapshotWriter, resume_streams
from stepcell.runtime.streams.scheduler import Scheduler
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource

Model = Callable[..., Path]
ONE = np.ones((3, 4, 4), np.float32)


class Watched:
    """Counts steps and frames, and can delay the steps."""

    def __init__(self, pause: float = 0.0) -> None:
        self.steps: list[int] = []  # frames in each
        self.most = 0  # largest number of queued frames
        self._pause = pause

    def step(self, seconds: float) -> None:
        self.steps.append(0)
        if self._pause:
            time.sleep(self._pause)

    def frame(self, stream: Stream, seconds: float) -> None:
        self.steps[-1] += 1

    def progress(self, run: RunProgress) -> None:
        self.most = max([self.most, *(sum(stream.queued.values()) for stream in run.streams)])


def run(
    loop: StepLoop, streams: Sequence[Stream], watched: Watched | None = None, **options: Any
) -> list[StreamReport]:
    if watched is not None:
        options |= {"times": watched, "progress": watched.progress}
    return Scheduler(loop, streams, **options).run()


def alone(model: Path, frames: Sequence[Any], path: Path, reset: ResetPolicy | None = None) -> NDArray[Any]:
    """Results of one stream in a loop of its own."""
    with StepLoop.open(model, threads=1) as loop:
        run(loop, [Stream(FrameSource("alone", frames), ArraySink(path), reset=reset)])
    result: NDArray[Any] = np.load(path)
    return result


def together(
    model: Path, streams: Sequence[Stream], watched: Watched | None = None, **options: Any
) -> list[StreamReport]:
    with StepLoop.open(model, slots=len(streams), threads=1) as loop:
        return run(loop, streams, watched, **options)


def test_streams_together_equal_streams_alone(denoiser_onnx: Path, tmp_path: Path) -> None:
    """Real clips that differ in length, rate and resets; results are compared bit by bit."""
    clip, other = read_clip("carphone_pristine"), read_clip("bikes", shrink=1)
    other = other[:, : clip.shape[1], : clip.shape[2]]
    clips = [clip[:70], other[:33], clip[20:100:2]]
    assert len({each.shape[1:] for each in clips}) == 1
    policies = [ResetPolicy(), ResetPolicy(every=10), ResetPolicy(cut=True, every=17)]
    expected = [
        alone(denoiser_onnx, each, tmp_path / "alone.npy", reset=policy)
        for each, policy in zip(clips, policies, strict=True)
    ]
    streams = [
        Stream(
            FrameSource(f"clip{number}", each, pause=pause),
            ArraySink(tmp_path / f"{number}.npy"),
            reset=policy,
        )
        for number, (each, policy, pause) in enumerate(zip(clips, policies, (0, 0.004, 0.02), strict=True))
    ]
    watched = Watched()
    reports = together(denoiser_onnx, streams, watched=watched)
    for number, wanted in enumerate(expected):
        found = np.load(tmp_path / f"{number}.npy")
        assert found.shape == wanted.shape
        worst = np.abs(found - wanted).max()
        assert worst == 0, f"stream {number}: worst difference {worst:g}"
    assert [report.frames for report in reports] == [70, 33, 40]
    assert [report.resets["every"] for report in reports] == [0, 3, 2]
    assert all(report.stopped == "end of input" and report.error is None for report in reports)
    assert sum(watched.steps) == 143
    assert watched.steps[0] == 3, "the first step has all streams"
    assert len(watched.steps) < 143, "frames that are ready at the same time share a step"


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
    assert stream.reader is not None
    assert stream.converter is not None
    take, thread = stream.converter.take, stream.reader._thread

    def slowly() -> ConvertedFrame | None:
        frame = take()
        if frame is None:  # fails before the converter is asked again
            gate.set()
            thread.join()
        return frame

    stream.converter.take = slowly  # type: ignore[method-assign]
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
        assert stream.reader is not None
        stream.reader.join()
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


def test_frames_that_were_all_late_are_not_called_absent(accumulator: Model) -> None:
    stream = Stream(FrameSource("a", [ONE] * 9, live=True), deadline=Deadline(1e-9))
    with StepLoop.open(accumulator()) as loop:
        (report,) = run(loop, [stream])
    assert report.error == "a: all its 9 frames were dropped"
    assert sum(report.dropped.values()) == 9


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


def test_limits_and_snapshots_go_through_several_clips_piece_by_piece(denoiser_onnx: Path, tmp_path: Path) -> None:
    clip = read_clip("carphone_pristine")
    clips = {"a": clip[:25], "b": clip[40:52]}
    expected = {name: alone(denoiser_onnx, each, tmp_path / "alone.npy") for name, each in clips.items()}
    path = tmp_path / "state.safetensors"
    pieces: dict[str, list[NDArray[Any]]] = {"a": [], "b": []}
    for piece in range(3):
        with StepLoop.open(denoiser_onnx, slots=2, threads=1) as loop:
            starts = resume_streams(loop, path, ["a", "b"])
            streams = [
                Stream(
                    FrameSource(name, each),
                    ArraySink(tmp_path / f"{name}{piece}.npy"),
                    start=starts.get(name, 0),
                    limit=10,
                )
                for name, each in clips.items()
            ]
            run(loop, streams, snapshots=SnapshotWriter(path, 4, "a, b"))
            assert all(stream.failure is None for stream in streams)
        for name in clips:
            if (tmp_path / f"{name}{piece}.npy").exists():
                pieces[name].append(np.load(tmp_path / f"{name}{piece}.npy"))
    assert [[len(each) for each in pieces[name]] for name in "ab"] == [[10, 10, 5], [10, 2]]
    for name, wanted in expected.items():
        worst = np.abs(np.concatenate(pieces[name]) - wanted).max()
        assert worst == 0, f"{name}: worst difference {worst:g}"


def test_a_stream_that_broke_is_not_in_the_snapshot(accumulator: Model, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    bad = np.full_like(ONE, 3e38)
    streams = [Stream(FrameSource("a", [ONE] * 12)), Stream(FrameSource("b", [ONE, bad, bad, ONE]))]
    reports = together(accumulator(), streams, snapshots=SnapshotWriter(path, 5, "a, b"))
    assert (reports[1].stopped, reports[1].frames) == ("error", 2)
    with StepLoop.open(accumulator(), slots=2) as loop:
        starts = resume_streams(loop, path, ["a", "b"])
        assert starts == {"a": 12}
        clips = {"a": [ONE] * 15, "b": [ONE] * 2}
        streams = [
            Stream(FrameSource(name, clip), ArraySink(tmp_path / name), start=starts.get(name, 0))
            for name, clip in clips.items()
        ]
        run(loop, streams)
    assert [np.load(tmp_path / name)[:, 0, 0, 0].tolist() for name in "ab"] == [[13, 14, 15], [1, 2]]


def test_a_second_run_of_a_loop_starts_afresh(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(), slots=2) as loop:
        run(loop, [Stream(FrameSource(name, [ONE] * 3)) for name in "ab"])
        streams = [
            Stream(FrameSource(name, [np.ones((3, 9, 9), np.float32)] * 2), ArraySink(tmp_path / name)) for name in "bc"
        ]
        reports = run(loop, streams)
    assert [report.frames for report in reports] == [2, 2]
    assert [np.load(tmp_path / name)[:, 0, 0, 0].tolist() for name in "bc"] == [[1, 2], [1, 2]]


def test_one_stream_goes_on_while_the_other_starts_afresh(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(), slots=2) as loop:
        run(loop, [Stream(FrameSource(name, [ONE] * 3)) for name in "ab"])
        streams = [
            Stream(FrameSource(name, [ONE] * 5), ArraySink(tmp_path / name), start=start)
            for name, start in zip("ab", (3, 0), strict=True)
        ]
        run(loop, streams)
    assert [np.load(tmp_path / name)[:, 0, 0, 0].tolist() for name in "ab"] == [[4, 5], [1, 2, 3, 4, 5]]


def test_more_streams_than_slots(accumulator: Model) -> None:
    streams = [Stream(FrameSource(name, [ONE])) for name in "abc"]
    with StepLoop.open(accumulator(), slots=2) as loop:
        reports = run(loop, streams)
    assert all("all 2 are in use" in (report.error or "") for report in reports)
    assert all(isinstance(stream.failure, StateError) for stream in streams)
