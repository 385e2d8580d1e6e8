"""A whole stream: what comes out, what is reported, and what is kept when it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import DeviceError, InputError, OutputError, StepcellError
from stepcell.runtime import StepLoop
from stepcell.runtime.sinks import ArraySink, open_sink
from stepcell.runtime.sources import open_source
from stepcell.runtime.stop import StopRequest
from stepcell.runtime.stream import StreamError, run_stream

Model = Callable[..., Path]


class Frames:
    """A source of given frames; an exception among them is raised in its turn."""

    name = "frames"
    fps: Fraction | None = None
    length: int | None = None

    def __init__(self, frames: list[Any]) -> None:
        self._frames = frames
        self.closed = False

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for frame in self._frames:
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    def close(self) -> None:
        self.closed = True


def clip(count: int, value: int = 1, shape: tuple[int, ...] = (5, 6, 3)) -> list[Any]:
    return [np.full(shape, value, np.uint8) for _ in range(count)]


def test_clip_equals_stepping_by_hand(denoiser_onnx: Path, clip_path: Path, tmp_path: Path) -> None:
    with StepLoop.open(denoiser_onnx) as loop:
        report = run_stream(
            loop, open_source(str(clip_path)), ArraySink(tmp_path / "out.npy"), reset_every=50, limit=100
        )
        loop.reset()
        for number, (frame, y) in enumerate(
            zip(open_source(str(clip_path)), np.load(tmp_path / "out.npy"), strict=False)
        ):
            if number == 50:
                loop.reset()
            x = np.divide(frame.transpose(2, 0, 1)[None], np.float32(255), dtype=np.float32)
            np.testing.assert_array_equal(loop.step(x=x)["y"][0], y, err_msg=f"frame {number}")
    assert (report.frames, report.resets, report.stopped) == (100, 1, "limit")
    assert report.frame_size == (176, 144)
    assert report.frames_per_second == pytest.approx(100 / report.seconds, rel=0.05)
    for times in (report.step, report.decode, report.convert, report.encode):
        assert times.count == 99
        assert times.p50_ms is not None


def test_odd_sizes_are_padded_and_cropped(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(range=(0.0, 1.0), pad_multiple=8)) as loop:
        run_stream(loop, Frames(clip(3, 20)), open_sink(str(tmp_path / "out"), Fraction(25)))
    frames = [frame[..., 0] for frame in open_source(str(tmp_path / "out"))]
    np.testing.assert_array_equal(frames, np.broadcast_to(np.uint8([20, 40, 60])[:, None, None], (3, 5, 6)))


def test_without_a_sink_frames_are_only_stepped(accumulator: Model) -> None:
    done: list[int] = []
    source = Frames(clip(4))
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, source, on_frame=done.append)
    assert (report.frames, report.output, report.stopped, report.encode.first_ms) == (4, None, "end of input", None)
    assert done == [1, 2, 3, 4]
    assert source.closed


def test_a_second_stream_starts_afresh(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop:
        run_stream(loop, Frames(clip(4)))
        report = run_stream(loop, Frames(clip(2, shape=(9, 9, 3))), ArraySink(tmp_path / "out.npy"))
    assert report.step.count == 1
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("name", ["out.mp4", "out.npy", "out"])
@pytest.mark.parametrize(
    "breaks",
    [InputError("frames: broken at frame 3"), np.zeros((5, 7, 3), np.uint8), DeviceError("gone")],
    ids=["unreadable", "size", "device"],
)
def test_broken_stream_keeps_what_was_written(accumulator: Model, breaks: Any, name: str, tmp_path: Path) -> None:
    source = Frames([*clip(3), breaks, *clip(3)])
    path = tmp_path / name
    with StepLoop.open(accumulator(range=(0.0, 1.0))) as loop, pytest.raises(StreamError) as caught:
        run_stream(loop, source, open_sink(str(path), Fraction(25)))
    error = caught.value
    assert error.exit_code == (6 if isinstance(breaks, DeviceError) else 1)
    assert f"{name} holds the 3 frames before it" in error.message
    assert (error.report.frames, error.report.stopped) == (3, "error")
    frames = np.load(path) if name == "out.npy" else list(open_source(str(path)))
    assert len(frames) == 3
    assert source.closed


@pytest.mark.parametrize("name", ["out.mp4", "out.npy"])
@pytest.mark.parametrize(
    "frames", [[], [InputError("broken")], [np.zeros((4, 4, 1), np.uint8)]], ids=["no", "bad", "grey"]
)
def test_stream_that_never_starts_leaves_the_old_file(
    accumulator: Model, frames: list[Any], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text("precious")
    with StepLoop.open(accumulator()) as loop, pytest.raises(StreamError) as caught:
        run_stream(loop, Frames(frames), open_sink(str(path), Fraction(25)))
    assert caught.value.report.frames == 0
    assert path.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


class BrokenSink:
    name = "sink"
    takes_pixels = False

    def __init__(self, fails_at: str) -> None:
        self._fails_at = fails_at
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._fails_at:
            raise OutputError("sink: cannot be written (No space left on device)")

    def write(self, frame: NDArray[Any]) -> None:
        self._call("write")

    def close(self) -> None:
        self._call("close")

    def abandon(self) -> None:
        self._call("abandon")


@pytest.mark.parametrize("fails_at", ["write", "close"])
def test_failing_output_is_abandoned(accumulator: Model, fails_at: str) -> None:
    sink = BrokenSink(fails_at)
    with StepLoop.open(accumulator()) as loop, pytest.raises(StreamError, match=r"No space left on device\)$"):
        run_stream(loop, Frames(clip(2)), sink)
    assert sink.calls[-1] == "abandon"


def test_stop_request_ends_between_two_frames(accumulator: Model, tmp_path: Path) -> None:
    stop = StopRequest()

    def after(count: int) -> None:
        if count == 2:
            import signal

            signal.raise_signal(signal.SIGTERM)

    with stop.listening(), StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, Frames(clip(9)), ArraySink(tmp_path / "out.npy"), stop=stop, on_frame=after)
    assert (report.frames, report.stopped) == (2, "interrupted")
    assert len(np.load(tmp_path / "out.npy")) == 2


def test_keyboard_interrupt_nobody_listens_for_goes_on(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop, pytest.raises(KeyboardInterrupt):
        run_stream(loop, Frames([*clip(2), KeyboardInterrupt()]), ArraySink(tmp_path / "out.npy"))
    assert len(np.load(tmp_path / "out.npy")) == 2


def test_output_that_is_no_picture(accumulator: Model, tmp_path: Path) -> None:
    import msgspec
    import onnx

    from stepcell.contract import METADATA_KEY, StepContract

    path = accumulator()
    model = onnx.load(path)
    (entry,) = model.metadata_props
    assert entry.key == METADATA_KEY
    contract = StepContract.from_json(entry.value)
    flat = msgspec.structs.replace(contract.outputs[0], layout=None)
    entry.value = msgspec.structs.replace(contract, outputs=(flat,)).to_json()
    onnx.save(model, path)
    with StepLoop.open(path) as loop:
        with pytest.raises(StreamError, match="no output of this model is a picture") as caught:
            run_stream(loop, Frames(clip(2)), open_sink(str(tmp_path / "out.mp4"), Fraction(25)))
        assert "out.npy" in (caught.value.hint or "")
        run_stream(loop, Frames(clip(2)), ArraySink(tmp_path / "out.npy"))
    assert np.load(tmp_path / "out.npy").shape == (2, 3, 5, 6)


def test_model_that_takes_no_picture(accumulator: Model) -> None:
    with (
        StepLoop.open(accumulator(shape=("batch", 4), layout=None)) as loop,
        pytest.raises(StepcellError, match="a stream of frames needs exactly one input"),
    ):
        run_stream(loop, Frames(clip(2)))


def test_nan_output_is_an_error_in_pictures(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(range=(0.0, 1.0)), check_finite=False) as loop:
        frames = [np.zeros((3, 4, 4), np.float32), np.full((3, 4, 4), np.nan, np.float32)]
        with pytest.raises(StreamError, match="y: the model returned NaN or Inf") as caught:
            run_stream(loop, Frames(frames), open_sink(str(tmp_path / "out.mp4"), Fraction(25)))
    assert caught.value.report.frames == 1
