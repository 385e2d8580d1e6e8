"""Several streams in one loop: what each gets, when one is slow, lost or broken."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import DeviceError, InputError, OutputError, StateError
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime import StepLoop
from stepcell.runtime.media.sinks import ArraySink, open_sink
from stepcell.runtime.media.sources import RawSource, open_source
from stepcell.runtime.streams.frame_reader import DEPTH, Frame, Reconnect
from stepcell.runtime.streams.report import RunReport
from stepcell.runtime.streams.reset_policy import ResetPolicy, ResetWatch
from stepcell.runtime.streams.run import run_stream, run_streams
from stepcell.runtime.streams.shutdown import StopRequest
from stepcell.runtime.streams.snapshot_writer import SnapshotWriter, saved_frames
from stepcell.runtime.streams.stream import Deadline, Lane

Model = Callable[..., Path]
ONE = np.ones((3, 4, 4), np.float32)


class Frames:
    """A source of given frames, each after a pause; an exception among them is raised in its turn."""

    fps: Fraction | None = None
    length: int | None = None
    seconds: float | None = None

    def __init__(self, name: str, frames: Sequence[Any], *, pause: float = 0.0, live: bool = False) -> None:
        self.name, self.live = name, live
        self._frames, self._pause = frames, pause
        self.closed = False
        self.read = 0

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for number, frame in enumerate(self._frames):
            if self._pause:
                time.sleep(self._pause)
            if isinstance(frame, BaseException):
                raise frame
            self.seconds = number / 25
            self.read += 1
            yield frame

    def close(self) -> None:
        self.closed = True


class Watched:
    """Is told of steps and frames, and can be slow."""

    def __init__(self, pause: float = 0.0) -> None:
        self.steps: list[int] = []  # frames in each
        self.most = 0  # frames that waited at one moment
        self.lanes: list[Lane] = []
        self._pause = pause

    def step(self, seconds: float) -> None:
        self.steps.append(0)
        if self._pause:
            time.sleep(self._pause)

    def frame(self, lane: Lane, seconds: float) -> None:
        self.steps[-1] += 1

    def tick(self) -> None:
        self.most = max([self.most, *(sum(lane.queued.values()) for lane in self.lanes)])


def alone(model: Path, frames: Sequence[Any], path: Path, **options: Any) -> NDArray[Any]:
    """What one stream gives in a loop of its own."""
    with StepLoop.open(model, threads=1) as loop:
        run_stream(loop, Frames("alone", frames), ArraySink(path), **options)
    result: NDArray[Any] = np.load(path)
    return result


def together(model: Path, lanes: Sequence[Lane], **options: Any) -> list[RunReport]:
    with StepLoop.open(model, slots=len(lanes), threads=1) as loop:
        return run_streams(loop, lanes, **options)


def test_streams_together_equal_streams_alone(denoiser_onnx: Path, tmp_path: Path) -> None:
    """Real clips of other lengths and rates, resets of their own; the numbers are compared bit by bit."""
    clip, other = read_clip("carphone_pristine"), read_clip("bikes", shrink=1)
    other = other[:, : clip.shape[1], : clip.shape[2]]
    clips = [clip[:70], other[:33], clip[20:100:2]]
    assert len({each.shape[1:] for each in clips}) == 1
    policies = [ResetPolicy(), ResetPolicy(every=10), ResetPolicy(cut=True, every=17)]
    expected = [
        alone(denoiser_onnx, each, tmp_path / "alone.npy", resets=ResetWatch(policy))
        for each, policy in zip(clips, policies, strict=True)
    ]
    lanes = [
        Lane(
            Frames(f"clip{number}", each, pause=pause),
            ArraySink(tmp_path / f"{number}.npy"),
            resets=ResetWatch(policy),
        )
        for number, (each, policy, pause) in enumerate(zip(clips, policies, (0, 0.004, 0.02), strict=True))
    ]
    watched = Watched()
    reports = together(denoiser_onnx, lanes, watchers=[watched])
    for number, wanted in enumerate(expected):
        found = np.load(tmp_path / f"{number}.npy")
        assert found.shape == wanted.shape
        worst = np.abs(found - wanted).max()
        assert worst == 0, f"stream {number}: worst difference {worst:g}"
    assert [report.frames for report in reports] == [70, 33, 40]
    assert [report.resets["every"] for report in reports] == [0, 3, 2]
    assert all(report.stopped == "end of input" and report.error is None for report in reports)
    assert sum(watched.steps) == 143
    assert watched.steps[0] == 3, "all begin together"
    assert len(watched.steps) < 143, "frames that are there at the same time share a step"


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
    lanes = [
        Lane(Frames(name, clip), ArraySink(tmp_path / f"{name}.npy")) for name, clip in zip(names, clips, strict=True)
    ]
    reports = together(accumulator(), lanes)
    assert [report.frames for report in reports] == [20, 3, 5, 2, 0, 0]
    assert [lane.failure is not None for lane in lanes] == [False, True, True, True, True, True]
    errors = [
        "",
        "broken at frame 3",
        "c: x: 48 of 48 values are NaN",
        "d: frame 2 is (3, 8, 8), the first one (3, 4, 4)",
        "e: its frames",
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

    lanes = [
        Lane(Frames("a", [ONE] * 30), Full(tmp_path / "a.npy")),
        Lane(Frames("b", [ONE] * 30), ArraySink(tmp_path / "b.npy")),
        Lane(Frames("c", [ONE] * 30), open_sink(str(tmp_path / "c.mp4"), Fraction(25))),
    ]
    reports = together(accumulator(range=(0.0, 1.0)), lanes)
    assert "No space left on device) (" + str(tmp_path / "a.npy") + " holds the first 3 of " in (reports[0].error or "")
    assert reports[0].written == len(np.load(tmp_path / "a.npy")) == 3
    assert [(report.frames, report.written) for report in reports[1:]] == [(30, 30), (30, 30)]
    assert len(np.load(tmp_path / "b.npy")) == len(list(open_source(str(tmp_path / "c.mp4")))) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", "c.mp4", "sum.onnx"]


def test_a_source_that_breaks_while_it_is_asked_is_no_end_of_input(accumulator: Model) -> None:
    gate = threading.Event()

    class Breaking(Frames):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            yield ONE
            gate.wait(10)
            raise InputError("broken")

    with StepLoop.open(accumulator()) as loop:
        lane = Lane(Breaking("a", []))
        lane.begin(loop.contract, threading.Condition())
    assert lane.feed is not None
    take, thread = lane.feed.take, lane.feed._thread

    def slowly() -> Frame | None:
        frame = take()
        if frame is None:  # and now, before anybody looks again, it breaks
            gate.set()
            thread.join()
        return frame

    lane.feed.take = slowly  # type: ignore[method-assign]
    while not lane.ready:
        time.sleep(0.001)
    assert lane.take()
    assert not lane.take()
    assert lane.stopped is None
    with pytest.raises(InputError, match="broken"):
        lane.take()


def test_an_output_that_fails_is_noticed_while_the_input_is_silent(accumulator: Model) -> None:
    reader, writer = os.pipe()

    class Full:
        name, takes_pixels, replaces = "full", False, False

        def write(self, frame: NDArray[Any]) -> None:
            raise OutputError("full: cannot be written (No space left on device)")

        def close(self) -> None: ...

        def salvage(self) -> int:
            return 0

        def abandon(self) -> None: ...

    os.write(writer, bytes(4 * 4 * 3))
    with os.fdopen(reader, "rb") as pipe, StepLoop.open(accumulator()) as loop:
        lane = Lane(RawSource(pipe, (4, 4), 3), Full())
        started = time.monotonic()
        run_streams(loop, [lane])
        assert time.monotonic() - started < 5
        os.close(writer)
        assert lane.feed is not None
        lane.feed.wait()
    assert isinstance(lane.failure, OutputError)


def test_a_device_that_fails_ends_every_stream(accumulator: Model, tmp_path: Path) -> None:
    lanes = [Lane(Frames(name, [ONE] * 9), ArraySink(tmp_path / f"{name}.npy")) for name in "ab"]
    with StepLoop.open(accumulator(), slots=2) as loop:
        step = loop.step_slots
        steps: list[Any] = []

        def failing(frames: Any) -> Any:
            steps.append(frames)
            if len(steps) > 4:
                raise DeviceError("gone")
            return step(frames)

        loop.step_slots = failing  # type: ignore[method-assign]
        reports = run_streams(loop, lanes)
    for name, report in zip("ab", reports, strict=True):
        assert report.error == f"gone ({tmp_path / name}.npy holds the {report.frames} frames before it)"
    assert all(lane.failure is not None and lane.failure.exit_code == 6 for lane in lanes)
    for name, report in zip("ab", reports, strict=True):
        assert len(np.load(tmp_path / f"{name}.npy")) == report.frames > 0


def test_nan_in_one_stream_stays_there(accumulator: Model, tmp_path: Path) -> None:
    bad = np.full_like(ONE, 3e38)  # finite, and twice of it is not
    policies = ["ignore", "reset", "stop", "stop"]
    clips = [[bad] * 6, [ONE, bad, bad, ONE], [ONE, bad, bad, ONE], [ONE] * 6]
    lanes = [
        Lane(
            Frames(str(number), clip),
            ArraySink(tmp_path / f"{number}.npy"),
            resets=ResetWatch(ResetPolicy(on_nonfinite=policy)),  # type: ignore[arg-type]
        )
        for number, (clip, policy) in enumerate(zip(clips, policies, strict=True))
    ]
    reports = together(accumulator(), lanes)
    assert [report.frames for report in reports] == [6, 4, 2, 6]
    assert [report.non_finite for report in reports] == [0, 1, 1, 0]
    assert [report.resets["non-finite"] for report in reports] == [0, 1, 0, 0]
    assert np.isinf(np.load(tmp_path / "0.npy")[-1]).all()
    assert np.load(tmp_path / "1.npy")[:, 0, 0, 0].tolist() == np.float32([1, 3e38, 3e38, 3e38]).tolist()
    assert np.load(tmp_path / "3.npy")[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert "2: frame 2: y: the model returned NaN or Inf" in (reports[2].error or "")


def test_late_frames_are_dropped_and_counted_exactly(accumulator: Model, tmp_path: Path) -> None:
    """A live source at 500 frames/s against steps of 20 ms: what was not stepped is in the report."""
    count = 150
    frames = [np.full((3, 4, 4), number, np.float32) for number in range(count)]
    fast = Lane(
        Frames("fast", frames, pause=0.002, live=True),
        ArraySink(tmp_path / "fast.npy"),
        deadline=Deadline(0.005),
        resets=ResetWatch(ResetPolicy(every=1)),  # y = x: the results say which frames were stepped
    )
    slow = Lane(Frames("slow", [ONE] * 9, pause=0.01), ArraySink(tmp_path / "slow.npy"), deadline=Deadline(0.001))
    reports = together(accumulator(), [fast, slow], watchers=[Watched(0.02)])
    stepped = np.load(tmp_path / "fast.npy")[:, 0, 0, 0]
    dropped = reports[0].dropped
    assert (np.diff(stepped) > 0).all()
    assert len(stepped) == reports[0].frames
    assert reports[0].frames + dropped["late"] + dropped["queue full"] == count
    assert dropped["late"] > 5
    assert dropped["queue full"] > 5
    assert reports[0].late == 0
    # A file is read as fast as it is stepped: none of its frames is late.
    assert (reports[1].frames, reports[1].dropped) == (9, {"late": 0, "queue full": 0})


def test_late_frames_are_stepped_and_counted_where_the_source_can_wait(accumulator: Model, tmp_path: Path) -> None:
    source = Frames("pipe", [ONE] * 40, live=True)
    lane = Lane(source, ArraySink(tmp_path / "out.npy"), deadline=Deadline(0.002, "block"))
    with StepLoop.open(accumulator()) as loop:
        (report,) = run_streams(loop, [lane], watchers=[Watched(0.005)])
    assert (report.frames, report.dropped) == (40, {"late": 0, "queue full": 0})
    assert 30 <= report.late <= 40
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == list(range(1, 41))


@pytest.mark.parametrize("slow", ["step", "write"])
def test_queues_are_bounded(accumulator: Model, tmp_path: Path, slow: str) -> None:
    class Slow(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            time.sleep(0.003)
            super().write(frame)

    watched = Watched(0.003 if slow == "step" else 0.0)
    source = Frames("a", [ONE] * 120)
    sink = (Slow if slow == "write" else ArraySink)(tmp_path / "a.npy")
    watched.lanes = [Lane(source, sink)]
    ahead: list[int] = []

    class Ahead(Watched):
        def frame(self, lane: Lane, seconds: float) -> None:
            ahead.append(source.read - lane.frames)

    with StepLoop.open(accumulator()) as loop:
        (report,) = run_streams(loop, watched.lanes, watchers=[watched, Ahead()])
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
        def tick(self) -> None:
            if lanes[1].frames == 50:
                gate.set()

    lanes = [
        Lane(Frames("stuck", [ONE] * 50), Stuck(tmp_path / "stuck.npy")),
        Lane(Frames("free", [ONE] * 50), ArraySink(tmp_path / "free.npy")),
    ]
    started = time.monotonic()
    reports = together(accumulator(), lanes, watchers=[Opening()])
    assert time.monotonic() - started < 9, "the free one had to wait"
    assert [report.frames for report in reports] == [50, 50]
    for name in ("stuck", "free"):
        assert np.load(tmp_path / f"{name}.npy")[:, 0, 0, 0].tolist() == list(range(1, 51))


def test_an_output_that_is_stuck_is_not_waited_for_in_every_step(
    accumulator: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepcell.runtime.streams.scheduler.GATHER", 20.0)
    gate = threading.Event()

    class Stuck(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            gate.wait(60)
            super().write(frame)

    class Opening(Watched):
        def tick(self) -> None:
            if lanes[1].frames == 12:
                gate.set()

    lanes = [
        Lane(Frames("stuck", [ONE] * 12), Stuck(tmp_path / "stuck.npy")),
        Lane(Frames("free", [ONE] * 12), ArraySink(tmp_path / "free.npy")),
    ]
    started = time.monotonic()
    reports = together(accumulator(), lanes, watchers=[Opening()])
    assert time.monotonic() - started < 15
    assert [report.frames for report in reports] == [12, 12]


@pytest.mark.parametrize(("gap", "resets"), [(None, 1), (60.0, 0), (0.05, 1)])
def test_a_camera_that_came_back_starts_afresh_unless_the_gap_is_short(
    accumulator: Model, tmp_path: Path, gap: float | None, resets: int
) -> None:
    again = iter([InputError("not yet"), InputError("not yet"), Frames("cam", [ONE] * 5, live=True)])

    def reopen() -> Frames:
        found = next(again, InputError("gone for good"))
        if isinstance(found, InputError):
            raise found
        return found

    camera = Lane(
        Frames("cam", [*[ONE] * 4, InputError("cam: cable")], live=True),
        ArraySink(tmp_path / "cam.npy"),
        resets=ResetWatch(ResetPolicy(gap=gap)),
        reconnect=Reconnect(reopen, 1.0, first=0.05, most=0.1),
    )
    other = Lane(Frames("file", [ONE] * 10), ArraySink(tmp_path / "file.npy"))
    reports = together(accumulator(), [camera, other])
    expected = [1, 2, 3, 4, *([1, 2, 3, 4, 5] if resets else [5, 6, 7, 8, 9])]
    assert np.load(tmp_path / "cam.npy")[:, 0, 0, 0].tolist() == expected
    assert (reports[0].reconnects, reports[0].resets["gap"]) == (1, resets)
    assert "lost, and not back within 1 s (gone for good)" in (reports[0].error or "")
    assert np.load(tmp_path / "file.npy")[:, 0, 0, 0].tolist() == list(range(1, 11))


def test_a_reconnection_is_a_gap_also_where_its_first_frames_are_dropped(accumulator: Model) -> None:
    again = iter([Frames("cam", [ONE] * 40, live=True)])

    def reopen() -> Frames:
        if not camera.frames:
            raise InputError("not before a frame was stepped")
        return next(again, Frames("cam", [], live=True))

    camera = Lane(
        Frames("cam", [ONE] * 40, live=True),
        deadline=Deadline(60.0),
        reconnect=Reconnect(reopen, 1.0, first=0.001, most=0.001),
    )
    with StepLoop.open(accumulator()) as loop:
        (report,) = run_streams(loop, [camera], watchers=[Watched(0.02)])
    assert sum(report.dropped.values()) + report.frames == 80
    assert report.frames < 30
    assert (report.reconnects, report.resets["gap"]) == (1, 1)


def test_a_stop_is_noticed_while_the_first_frames_are_waited_for(
    accumulator: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepcell.runtime.streams.scheduler.GATHER_FIRST", 30.0)
    stop, gate = StopRequest(), threading.Event()

    class Silent(Frames):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            time.sleep(0.5)  # the other one's frame has come by now, and waits for one of this
            stop.signal = signal.SIGTERM  # as a handler does it: nobody is woken
            gate.wait(60)
            return iter(())

    lanes = [Lane(Frames("a", [ONE])), Lane(Silent("b", [], live=True))]
    started = time.monotonic()
    reports = together(accumulator(), lanes, stop=stop)
    assert time.monotonic() - started < 20
    gate.set()
    assert {report.stopped for report in reports} == {"interrupted"}


def test_frames_that_were_all_late_are_not_called_absent(accumulator: Model) -> None:
    lane = Lane(Frames("a", [ONE] * 9, live=True), deadline=Deadline(1e-9))
    with StepLoop.open(accumulator()) as loop:
        (report,) = run_streams(loop, [lane])
    assert report.error == "a: all its 9 frames were dropped"
    assert sum(report.dropped.values()) == 9


def test_a_stop_finishes_every_output(accumulator: Model, tmp_path: Path) -> None:
    stop = StopRequest()

    class Stopping(Watched):
        def frame(self, lane: Lane, seconds: float) -> None:
            if lane.name == "b" and lane.frames == 7:
                stop.signal = 15  # type: ignore[assignment]

    names = ["a.npy", "b.mp4", "c"]
    sources = [Frames(name[0], [ONE] * 1000) for name in names]
    lanes = [
        Lane(source, open_sink(str(tmp_path / name), Fraction(25))) for source, name in zip(sources, names, strict=True)
    ]
    reports = together(accumulator(range=(0.0, 1.0)), lanes, stop=stop, watchers=[Stopping()])
    assert all(report.stopped == "interrupted" and report.error is None for report in reports)
    found = [len(np.load(tmp_path / "a.npy")), *(len(list(open_source(str(tmp_path / n)))) for n in names[1:])]
    assert found == [report.frames for report in reports]
    assert found[1] == 7
    assert all(source.closed for source in sources)


def test_a_further_signal_leaves_every_output_behind_that_hangs(accumulator: Model, tmp_path: Path) -> None:
    gate, stop = threading.Event(), StopRequest()

    class Stuck(ArraySink):
        def write(self, frame: NDArray[Any]) -> None:
            gate.wait(60)

    lanes = [Lane(Frames(name, [ONE] * 3), Stuck(tmp_path / f"{name}.npy")) for name in "ab"]
    timers = [threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)) for seconds in (0.5, 1.0)]
    with stop.listening():
        for timer in timers:
            timer.start()
        started = time.monotonic()
        reports = together(accumulator(), lanes, stop=stop)
        assert time.monotonic() - started < 20
    gate.set()
    assert stop.hurried
    assert [report.written for report in reports] == [0, 0]
    for name, report in zip("ab", reports, strict=True):
        assert report.error == f"{tmp_path / name}.npy: not finished when a further signal came"


def test_limits_and_snapshots_go_through_several_clips_piece_by_piece(denoiser_onnx: Path, tmp_path: Path) -> None:
    clip = read_clip("carphone_pristine")
    clips = {"a": clip[:25], "b": clip[40:52]}
    expected = {name: alone(denoiser_onnx, each, tmp_path / "alone.npy") for name, each in clips.items()}
    path = tmp_path / "state.safetensors"
    pieces: dict[str, list[NDArray[Any]]] = {"a": [], "b": []}
    for piece in range(3):
        with StepLoop.open(denoiser_onnx, slots=2, threads=1) as loop:
            starts = saved_frames(loop.restore(path)) if piece else {}
            lanes = [
                Lane(
                    Frames(name, each),
                    ArraySink(tmp_path / f"{name}{piece}.npy"),
                    start=starts.get(name, 0),
                    limit=10,
                    resets=ResetWatch(ResetPolicy()),
                )
                for name, each in clips.items()
            ]
            run_streams(loop, lanes, snapshots=SnapshotWriter(path, 4, "a, b"))
            assert all(lane.failure is None for lane in lanes)
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
    lanes = [Lane(Frames("a", [ONE] * 12)), Lane(Frames("b", [ONE, bad, bad, ONE]))]
    reports = together(accumulator(), lanes, snapshots=SnapshotWriter(path, 5, "a, b"))
    assert (reports[1].stopped, reports[1].frames) == ("error", 2)
    with StepLoop.open(accumulator(), slots=2) as loop:
        starts = saved_frames(loop.restore(path))
        assert starts == {"a": 12}
        clips = {"a": [ONE] * 15, "b": [ONE] * 2}
        lanes = [
            Lane(Frames(name, clip), ArraySink(tmp_path / name), start=starts.get(name, 0))
            for name, clip in clips.items()
        ]
        run_streams(loop, lanes)
    assert [np.load(tmp_path / name)[:, 0, 0, 0].tolist() for name in "ab"] == [[13, 14, 15], [1, 2]]


def test_a_second_run_of_a_loop_starts_afresh(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(), slots=2) as loop:
        run_streams(loop, [Lane(Frames(name, [ONE] * 3)) for name in "ab"])
        lanes = [Lane(Frames(name, [np.ones((3, 9, 9), np.float32)] * 2), ArraySink(tmp_path / name)) for name in "bc"]
        reports = run_streams(loop, lanes)
    assert [report.frames for report in reports] == [2, 2]
    assert [np.load(tmp_path / name)[:, 0, 0, 0].tolist() for name in "bc"] == [[1, 2], [1, 2]]


def test_one_stream_goes_on_while_the_other_starts_afresh(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(), slots=2) as loop:
        run_streams(loop, [Lane(Frames(name, [ONE] * 3)) for name in "ab"])
        lanes = [
            Lane(Frames(name, [ONE] * 5), ArraySink(tmp_path / name), start=start)
            for name, start in zip("ab", (3, 0), strict=True)
        ]
        run_streams(loop, lanes)
    assert [np.load(tmp_path / name)[:, 0, 0, 0].tolist() for name in "ab"] == [[4, 5], [1, 2, 3, 4, 5]]


def test_more_streams_than_slots(accumulator: Model) -> None:
    lanes = [Lane(Frames(name, [ONE])) for name in "abc"]
    with StepLoop.open(accumulator(), slots=2) as loop:
        reports = run_streams(loop, lanes)
    assert all("all 2 are in use" in (report.error or "") for report in reports)
    assert all(isinstance(lane.failure, StateError) for lane in lanes)
