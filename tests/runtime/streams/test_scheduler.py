"""Scheduler: several streams in one loop, each as it would be in a loop of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.errors import StateError
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.run_snapshots import SnapshotWriter, resume_streams
from stepcell.runtime.streams.stream import Stream
from tests.fakes.frame_source import FrameSource
from tests.runtime.streams.scheduling import ONE, Model, Watched, alone, run, together


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
