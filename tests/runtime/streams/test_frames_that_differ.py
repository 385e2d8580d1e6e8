"""Frames of another size, and frames with NaN: the stream ends, or goes on from the initial states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from tests.fakes.frame_source import FrameSource
from tests.runtime.media.clips import write_clip

Model = Callable[..., Path]
WIDE = [np.full((4, 6, 3), 10, np.uint8)] * 3
TALL = [np.full((6, 4, 3), 10, np.uint8)] * 2


def run(model: Path, frames: list[Any], output: Any = None, **options: Any) -> Any:
    return run_streams(model, FrameSource("camera", frames), output, **options).streams[0]


def test_another_size_ends_the_stream(accumulator: Model, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"camera: frame 3 is \(6, 4, 3\), the first one \(4, 6, 3\)") as caught:
        run(accumulator(), [*WIDE, *TALL], tmp_path / "out")
    assert "--on-size-change reset" in str(caught.value.hint)
    assert len(list(open_source(str(tmp_path / "out")))) == 3


def test_another_size_resets_where_asked(accumulator: Model, tmp_path: Path) -> None:
    model = accumulator(range=(0.0, 255.0))
    report = run(model, [*WIDE, *TALL, *WIDE], tmp_path / "out", on_size_change="reset")
    assert (report.frames, report.resets["size"]) == (8, 2)
    pictures = list(open_source(str(tmp_path / "out")))
    assert [int(picture[0, 0, 0]) for picture in pictures] == [10, 20, 30, 10, 20, 10, 20, 30]
    assert [picture.shape for picture in pictures] == [(4, 6, 3)] * 3 + [(6, 4, 3)] * 2 + [(4, 6, 3)] * 3


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_a_video_keeps_its_size(name: str, accumulator: Model, tmp_path: Path) -> None:
    wide = [np.full((32, 64, 3), 200, np.uint8)] * 2
    square = [np.full((64, 64, 3), 200, np.uint8)] * 2
    run(accumulator(range=(0.0, 255.0)), [*wide, *square], tmp_path / name, on_size_change="reset")
    frames = list(open_source(str(tmp_path / name)))
    assert [frame.shape for frame in frames] == [(32, 64, 3)] * 4
    assert frames[2][:, 20:44].min() > 180
    assert frames[2][:, :12].max() < 30


def test_an_array_of_one_shape_cannot_hold_two(accumulator: Model, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"frame 3 has shape \(3, 6, 4\), the first one \(3, 4, 6\)") as caught:
        run(accumulator(), [*WIDE, *TALL], tmp_path / "out.npy", on_size_change="reset")
    assert "--resize" in str(caught.value.hint)
    assert np.load(tmp_path / "out.npy").shape == (3, 3, 4, 6)


def test_resized_frames_are_all_of_one_size(accumulator: Model, tmp_path: Path) -> None:
    report = run(accumulator(), [*WIDE, *TALL], tmp_path / "out.npy", resize="8x8")
    assert (report.frames, report.frame_size) == (5, (8, 8))
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50]


def test_clips_of_different_sizes_share_a_model_of_a_fixed_size(accumulator: Model, tmp_path: Path) -> None:
    model = accumulator(shape=("batch", 3, 16, 24))
    small = write_clip(tmp_path / "small.mp4", [np.full((8, 12, 3), 50, np.uint8)] * 3)
    large = write_clip(tmp_path / "large.mp4", [np.full((48, 64, 3), 50, np.uint8)] * 3)
    reports = run_streams(model, [small, large], [tmp_path / "a.npy", tmp_path / "b.npy"], resize="stretch").streams
    assert [report.frames for report in reports] == [3, 3]
    assert np.load(tmp_path / "a.npy").shape == np.load(tmp_path / "b.npy").shape == (3, 3, 16, 24)


def tensors() -> list[NDArray[np.float32]]:
    frames = [np.ones((3, 4, 4), np.float32) for _ in range(6)]
    frames[3][0, 0, 0] = np.nan
    return frames


def test_a_frame_with_nan_ends_the_stream(accumulator: Model, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"frame 3: x: 1 of 48 values are NaN or Inf as float32") as caught:
        run(accumulator(), tensors(), tmp_path / "out.npy")
    assert "--on-nonfinite reset" in str(caught.value.hint)
    assert len(np.load(tmp_path / "out.npy")) == 3


def test_a_frame_with_nan_resets_where_asked(
    accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    report = run(accumulator(), tensors(), tmp_path / "out.npy", on_nonfinite="reset")
    assert (report.frames, report.non_finite, report.resets["non-finite"]) == (6, 1, 1)
    values = np.load(tmp_path / "out.npy")
    assert values[:, 1, 1, 1].tolist() == [1, 2, 3, 4, 1, 2]
    assert np.isnan(values[3, 0, 0, 0])
    assert np.isfinite(values[[0, 1, 2, 4, 5]]).all()
    assert "frame 3: x: NaN or Inf in the frame" in logged.text
    run(accumulator(range=(0.0, 1.0)), tensors(), tmp_path / "out", on_nonfinite="reset")
    assert [int(picture[0, 0, 0]) for picture in open_source(str(tmp_path / "out"))] == [255, 255, 255, 0, 255, 255]


def test_a_frame_with_nan_is_passed_on_where_asked(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop:
        report = run_streams(loop, FrameSource("a", tensors()), tmp_path / "out.npy", on_nonfinite="ignore").streams[0]
        assert loop.check_finite
    assert (report.frames, report.non_finite) == (6, 0)
    assert np.isnan(np.load(tmp_path / "out.npy")[3:, 0, 0, 0]).all()


def test_nan_of_one_stream_leaves_the_others_alone(accumulator: Model, tmp_path: Path) -> None:
    ones = [np.ones((3, 4, 4), np.float32)] * 6
    sources = [FrameSource("good", ones), FrameSource("bad", tensors())]
    outputs = [tmp_path / "good.npy", tmp_path / "bad.npy"]
    reports = run_streams(accumulator(), sources, outputs, on_nonfinite="reset").streams
    assert [report.non_finite for report in reports] == [0, 1]
    assert np.load(outputs[0])[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.load(outputs[1])[:, 1, 1, 1].tolist() == [1, 2, 3, 4, 1, 2]
    with pytest.raises(RunError, match="bad: frame 3: x: 1 of 48 values are NaN or Inf"):
        run_streams(accumulator(), [FrameSource("good", ones), FrameSource("bad", tensors())])
