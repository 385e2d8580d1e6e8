"""Frame converter: frames are converted in a background thread, in order, once, and only those that are stepped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.contract import TensorSpec
from stepcell.errors import InputError
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.postprocess import OutputPostprocessor
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.runtime.streams.deadline import Deadline, LateFrames
from stepcell.runtime.streams.frame_converter import ConvertedFrame, FrameConverter
from stepcell.runtime.streams.frame_reader import FrameReader
from stepcell.runtime.streams.report import RunError, StreamReport
from stepcell.runtime.streams.run import run_streams
from tests.fakes.frame_source import FrameSource

Model = Callable[..., Path]
SPEC = TensorSpec(
    name="x", dtype="float32", shape=("batch", 3, "height", "width"), layout="NCHW", range=(0.0, 1.0), pad_multiple=4
)
RANDOM = np.random.default_rng(0)


def pictures(count: int, size: tuple[int, int] = (6, 5)) -> list[NDArray[np.uint8]]:
    return list(RANDOM.integers(0, 256, (count, *size, 3), np.uint8))


class Pipeline:
    """A reader and its converter."""

    def __init__(
        self, frames: list[Any], *, depth: int = 3, drop_oldest: bool = False, spec: TensorSpec = SPEC, **options: Any
    ) -> None:
        self.changed = threading.Condition()
        self.reader = FrameReader(FrameSource("frames", frames), self.changed, depth=depth, drop_oldest=drop_oldest)
        self.converter = FrameConverter(self.reader, self.changed, spec, **options)

    def __iter__(self) -> Iterator[ConvertedFrame]:
        while True:
            with self.changed:
                assert self.changed.wait_for(lambda: self.converter.ready or self.converter.ended, 10)
            frame = self.converter.take()
            if frame is None:
                break
            yield frame
        self.reader.stop()
        self.converter.stop()
        self.converter.join()


def test_frames_are_converted_in_order_and_at_the_end_the_error_of_the_source_is_raised() -> None:
    frames = [*pictures(9), *pictures(9, (4, 8)), InputError("broken")]
    pipeline = iter(Pipeline(frames))
    for number, frame in enumerate(frames[:-1]):
        converted = next(pipeline)
        np.testing.assert_array_equal(converted.tensor, Preprocessor(SPEC, frame)(frame))
        assert (converted.frame.number, converted.finite) == (number, True)
        assert converted.frame.array is frame
    with pytest.raises(InputError, match="broken"):
        next(pipeline)


def test_released_tensors_are_used_again_and_others_are_not() -> None:
    frames, kept = pictures(40), []
    pipeline = Pipeline(frames)
    addresses = set()
    for converted in pipeline:
        assert converted.tensor is not None
        addresses.add(converted.tensor.ctypes.data)
        if converted.frame.number in (3, 7):
            kept.append(converted)
        else:
            pipeline.converter.release(converted)
    assert len(addresses) <= 5, "two in use, one ready, two kept"
    for converted in kept:
        expected = frames[converted.frame.number]
        np.testing.assert_array_equal(converted.tensor, Preprocessor(SPEC, expected)(expected))


def test_a_tensor_of_another_size_is_not_used_again() -> None:
    pipeline = Pipeline([*pictures(1), *pictures(2, (9, 9)), *pictures(2)])
    shapes = []
    for converted in pipeline:
        assert converted.tensor is not None
        shapes.append(converted.tensor.shape)
        time.sleep(0.01)  # the next one is converted before this one is released
        pipeline.converter.release(converted)
    assert shapes == [(1, 3, 8, 8), *[(1, 3, 12, 12)] * 2, *[(1, 3, 8, 8)] * 2]


def test_frames_that_are_the_tensors_are_never_written_to() -> None:
    """A model that takes bytes gets a view of each frame, which belongs to the source."""
    spec = TensorSpec(name="x", dtype="uint8", shape=("n", "height", "width", 3), layout="NHWC", range=(0.0, 255.0))
    frames = pictures(12)
    pipeline = Pipeline(frames, spec=spec)
    for converted, frame in zip(pipeline, frames, strict=True):
        assert converted.tensor is not None
        assert converted.tensor.base is not None
        assert np.shares_memory(converted.tensor, frame)
        pipeline.converter.release(converted)
        assert pipeline.converter._free == []


def test_only_floats_are_looked_at_for_nan() -> None:
    good = np.zeros((3, 4, 4), np.float32)
    frames = [good, np.full_like(good, np.nan), np.full_like(good, np.inf)]
    assert [converted.finite for converted in Pipeline(frames)] == [True, False, False]
    assert [converted.finite for converted in Pipeline(frames, check_finite=False)] == [False] * 3


def test_frames_that_are_not_stepped_are_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []
    call = Preprocessor.__call__

    def counted(self: Preprocessor, frame: Any, out: Any = None) -> Any:
        converted.append(int(frame[0, 0, 0]))
        return call(self, frame, out)

    monkeypatch.setattr(Preprocessor, "__call__", counted)
    frames = [np.full((4, 4, 3), number, np.uint8) for number in range(60)]
    found = [each.tensor is None for each in Pipeline(frames, unused=lambda frame: frame.number < 50)]
    assert (found, converted) == ([True] * 50 + [False] * 10, list(range(50, 60)))

    converted.clear()
    pipeline = Pipeline(frames, drop_oldest=True)
    while not pipeline.reader._done:  # nobody takes a frame meanwhile
        time.sleep(0.001)
    left = [each.frame.number for each in pipeline]
    assert left[-3:] == [57, 58, 59]
    assert converted == left
    assert len(left) + pipeline.reader.dropped == 60


def test_a_late_frame_is_lost_before_it_is_converted() -> None:
    drop, block = LateFrames(Deadline(1e-9)), LateFrames(Deadline(1e-9, "block"))
    assert all(each.tensor is None for each in Pipeline(pictures(3), unused=drop.is_lost))
    assert all(each.tensor is not None for each in Pipeline(pictures(3), unused=block.is_lost))
    assert drop.dropped == block.stepped == 0, "counted where the frame is taken"


def run(model: Path, frames: list[Any], output: Path | None, **options: Any) -> StreamReport:
    return run_streams(model, FrameSource("camera", frames), output, **options).streams[0]


def test_the_thread_that_steps_converts_nothing(
    accumulator: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {"Preprocessor": set(), "OutputPostprocessor": set()}
    for kind in (Preprocessor, OutputPostprocessor):

        def recorded(*args: Any, call: Any = kind.__call__, name: str = kind.__name__) -> Any:
            threads[name].add(threading.current_thread().name)
            return call(*args)

        monkeypatch.setattr(kind, "__call__", recorded)
    report = run(accumulator(), pictures(20), tmp_path / "out")
    assert threads == {"Preprocessor": {"convert camera"}, "OutputPostprocessor": {f"write {tmp_path / 'out'}"}}
    assert report.convert.count == 19
    assert report.convert.first_ms is not None
    assert not [each.name for each in threading.enumerate() if "camera" in each.name]


def test_a_frame_that_cannot_be_converted_ends_the_stream_there(accumulator: Model, tmp_path: Path) -> None:
    """The frames before it are written, though it was converted ahead of their steps."""
    grey = np.zeros((6, 5, 1), np.uint8)
    with pytest.raises(RunError, match="x: the model takes colour") as caught:
        run(accumulator(), [*pictures(5), grey, *pictures(3)], tmp_path / "out", on_size_change="reset")
    report = caught.value.report.streams[0]
    assert (report.frames, report.written, report.frame_size) == (5, 5, (5, 6))
    assert len(list(open_source(str(tmp_path / "out")))) == 5


@pytest.mark.parametrize(("bad", "words"), [(np.nan, "y: the model returned NaN or Inf"), (300, "the label 300 is no")])
def test_an_output_that_no_picture_can_show_ends_the_stream_there(
    accumulator: Model, tmp_path: Path, bad: float, words: str
) -> None:
    """The writer converts later, but the stream ends before the next step."""
    label = bad == 300
    model = accumulator(dtype="int32" if label else "float32", range=None if label else (0.0, 1.0))
    frames = [np.zeros((3, 4, 4), np.int32 if label else np.float32) for _ in range(30)]
    frames[4][0, 0, 0] = bad
    with pytest.raises(RunError, match=words) as caught:
        run(model, frames, tmp_path / "out", on_nonfinite="ignore")
    report = caught.value.report.streams[0]
    assert (report.frames, report.written, report.convert.count) == (4, 4, 3)
