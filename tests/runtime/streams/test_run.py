"""run_streams with one stream: results, report, and output after a failure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from stepcell import StepLoop
from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import DeviceError, InputError, OutputError, StepcellError
from stepcell.models.zoo.clips import read_clip
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.report import RunError, StreamReport
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl
from tests.fakes.frame_source import FrameSource

Model = Callable[..., Path]


def run_stream(loop: StepLoop, source: Any, sink: Any = None, **options: Any) -> StreamReport:
    (report,) = run_streams(loop, source, sink, **options).streams
    return report


def clip(count: int, value: int = 1, shape: tuple[int, ...] = (5, 6, 3)) -> list[Any]:
    return [np.full(shape, value, np.uint8) for _ in range(count)]


def test_clip_equals_stepping_by_hand(denoiser_onnx: Path, clip_path: Path, tmp_path: Path) -> None:
    with StepLoop.open(denoiser_onnx) as loop:
        report = run_stream(
            loop,
            open_source(str(clip_path)),
            ArraySink(tmp_path / "out.npy"),
            reset_every=50,
            limit=100,
        )
        loop.reset()
        for number, (frame, y) in enumerate(
            zip(open_source(str(clip_path)), np.load(tmp_path / "out.npy"), strict=False)
        ):
            if number == 50:
                loop.reset()
            x = np.divide(frame.transpose(2, 0, 1)[None], np.float32(255), dtype=np.float32)
            np.testing.assert_array_equal(loop.step(x=x)["y"][0], y, err_msg=f"frame {number}")
    assert (report.frames, report.resets["every"], report.stopped) == (100, 1, "limit")
    assert report.frame_size == (176, 144)
    assert report.frames_per_second == pytest.approx(100 / report.seconds, rel=0.05)
    for times in (report.step, report.decode, report.convert, report.encode):
        assert times.count == 99
        assert times.p50_ms is not None


def test_odd_sizes_are_padded_and_cropped(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(range=(0.0, 1.0), pad_multiple=8)) as loop:
        run_stream(loop, FrameSource("frames", clip(3, 20)), open_sink(str(tmp_path / "out"), Fraction(25)))
    frames = [frame[..., 0] for frame in open_source(str(tmp_path / "out"))]
    np.testing.assert_array_equal(frames, np.broadcast_to(np.uint8([20, 40, 60])[:, None, None], (3, 5, 6)))


def test_without_a_sink_frames_are_only_stepped(accumulator: Model) -> None:
    done: list[int] = []
    source = FrameSource("frames", clip(4))
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, source, progress=lambda run: done.append(run.streams[0].frames))
    assert (report.frames, report.output, report.stopped, report.encode.first_ms) == (4, None, "end of input", None)
    assert done == sorted(done)
    assert set(done) == {0, 1, 2, 3, 4}
    assert source.closed


def test_a_second_stream_starts_afresh(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop:
        run_stream(loop, FrameSource("frames", clip(4)))
        report = run_stream(loop, FrameSource("frames", clip(2, shape=(9, 9, 3))), ArraySink(tmp_path / "out.npy"))
    assert report.step.count == 1
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("name", ["out.mp4", "out.npy", "out"])
@pytest.mark.parametrize(
    "breaks",
    [InputError("frames: broken at frame 3"), np.zeros((5, 7, 3), np.uint8), DeviceError("gone")],
    ids=["unreadable", "size", "device"],
)
def test_broken_stream_keeps_what_was_written(accumulator: Model, breaks: Any, name: str, tmp_path: Path) -> None:
    source = FrameSource("frames", [*clip(3), breaks, *clip(3)])
    path = tmp_path / name
    with StepLoop.open(accumulator(range=(0.0, 1.0))) as loop, pytest.raises(RunError) as caught:
        run_stream(loop, source, open_sink(str(path), Fraction(25)))
    error = caught.value
    assert error.exit_code == (6 if isinstance(breaks, DeviceError) else 1)
    assert f"{name} holds the 3 frames before it" in error.message
    assert (error.report.streams[0].frames, error.report.streams[0].stopped) == (3, "error")
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
    with StepLoop.open(accumulator()) as loop, pytest.raises(RunError) as caught:
        run_stream(loop, FrameSource("frames", frames), open_sink(str(path), Fraction(25)))
    assert caught.value.report.streams[0].frames == 0
    assert path.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


class BrokenSink:
    name = "sink"
    takes_pixels = replaces = False

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

    def salvage(self) -> int:
        self._call("salvage")
        return 0

    def abandon(self) -> None:
        self._call("abandon")


@pytest.mark.parametrize("fails_at", ["write", "close"])
def test_failing_output_is_salvaged(accumulator: Model, fails_at: str) -> None:
    sink = BrokenSink(fails_at)
    with StepLoop.open(accumulator()) as loop, pytest.raises(RunError, match=r"No space left on device\)$"):
        run_stream(loop, FrameSource("frames", clip(2)), sink)
    assert sink.calls[-1] == "salvage"


def test_a_stop_ends_between_two_frames(accumulator: Model, tmp_path: Path) -> None:
    control = RunControl()

    def stop_after_two(run: RunProgress) -> None:
        if run.streams[0].frames == 2:
            control.stop()

    options = {"control": control, "progress": stop_after_two}
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, FrameSource("frames", clip(9)), ArraySink(tmp_path / "out.npy"), **options)
    assert (report.frames, report.stopped) == (2, "interrupted")
    assert len(np.load(tmp_path / "out.npy")) == 2


def test_keyboard_interrupt_nobody_listens_for_goes_on(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator()) as loop, pytest.raises(KeyboardInterrupt):
        run_stream(loop, FrameSource("frames", [*clip(2), KeyboardInterrupt()]), ArraySink(tmp_path / "out.npy"))
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
        with pytest.raises(RunError, match="no output of this model is a picture") as caught:
            run_stream(loop, FrameSource("frames", clip(2)), open_sink(str(tmp_path / "out.mp4"), Fraction(25)))
        assert "out.npy" in (caught.value.hint or "")
        run_stream(loop, FrameSource("frames", clip(2)), ArraySink(tmp_path / "out.npy"))
    assert np.load(tmp_path / "out.npy").shape == (2, 3, 5, 6)


def test_model_that_takes_no_picture(accumulator: Model) -> None:
    with (
        StepLoop.open(accumulator(shape=("batch", 4), layout=None)) as loop,
        pytest.raises(StepcellError, match=r"a stream of frames needs exactly one input.*; this one has 2 axes"),
    ):
        run_stream(loop, FrameSource("frames", clip(2)))


def test_nan_output_is_an_error_in_pictures(accumulator: Model, tmp_path: Path) -> None:
    with StepLoop.open(accumulator(range=(0.0, 1.0)), check_finite=False) as loop:
        frames = [np.zeros((3, 4, 4), np.float32), np.full((3, 4, 4), np.nan, np.float32)]
        with pytest.raises(RunError, match="y: the model returned NaN or Inf") as caught:
            run_stream(loop, FrameSource("frames", frames), open_sink(str(tmp_path / "out.mp4"), Fraction(25)))
    assert caught.value.report.streams[0].frames == 1


def test_gaps_and_cuts_reset_and_are_counted(accumulator: Model, tmp_path: Path) -> None:
    """Scene a, then b with a gap in time; the result is the sum of the frames since the last reset."""
    a, b = (np.random.default_rng(seed).integers(0, 2, (3, 32, 32)).astype(np.float32) for seed in (0, 1))
    source = FrameSource("frames", [a, a, a, b, b, b], times=[0.0, 0.04, 0.08, 0.12, 5.0, 5.04])
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, source, ArraySink(tmp_path / "out.npy"), reset_gap=1.0, reset_on_cut=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), [a, 2 * a, 3 * a, b, b, 2 * b])
    assert report.resets == {"every": 0, "gap": 1, "cut": 1, "size": 0, "demand": 0, "non-finite": 0}


def test_a_call_resets_before_the_next_frame(accumulator: Model, tmp_path: Path) -> None:
    control = RunControl()

    def reset_after_three(run: RunProgress) -> None:
        if run.streams[0].frames == 3 and not control.resets:
            control.reset()

    options = {"control": control, "progress": reset_after_three}
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, FrameSource("frames", clip(5)), ArraySink(tmp_path / "out.npy"), **options)
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == [1, 2, 3, 1, 2]
    assert report.resets["demand"] == 1


BAD = np.full((3, 4, 4), 3e38, np.float32)  # finite, but its double is not


def test_non_finite_resets_and_goes_on(accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    one = np.ones((3, 4, 4), np.float32)
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(
            loop,
            FrameSource("frames", [one, BAD, BAD, one]),
            ArraySink(tmp_path / "out.npy"),
            on_nonfinite="reset",
        )
    # The third frame is stepped again from the initial state, so that every frame has its result.
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == np.float32([1, 3e38, 3e38, 3e38]).tolist()
    assert report.resets["non-finite"] == 1
    assert "frame 2: y: the model returned NaN or Inf" in logged.text


def test_non_finite_stops_or_is_ignored_as_asked(accumulator: Model, tmp_path: Path) -> None:
    frames = [BAD, BAD, BAD]
    with StepLoop.open(accumulator()) as loop:
        with pytest.raises(RunError, match="frame 1: y: the model returned NaN or Inf") as caught:
            run_stream(loop, FrameSource("frames", frames))
        assert caught.value.report.streams[0].frames == 1
        assert run_stream(loop, FrameSource("frames", frames), on_nonfinite="ignore").resets["non-finite"] == 0


def test_a_frame_that_is_never_finite_does_not_end_the_stream(accumulator: Model, tmp_path: Path) -> None:
    inf = np.full((3, 4, 4), np.inf, np.float32)
    one = np.ones((3, 4, 4), np.float32)
    for name in ("out.npy", "out.mp4"):
        with StepLoop.open(accumulator(range=(0.0, 1.0)), check_finite=False) as loop:
            report = run_stream(
                loop,
                FrameSource("frames", [one, inf, one]),
                open_sink(str(tmp_path / name), Fraction(25)),
                on_nonfinite="reset",
            )
            assert loop.state()["h"].max() == 1
        assert (report.frames, report.resets["non-finite"]) == (3, 2)
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == [1, np.inf, 1]


def test_states_alone_are_looked_at_now_and_then(hidden: Path) -> None:
    with StepLoop.open(hidden) as loop:
        report = run_stream(loop, FrameSource("frames", [BAD] * 250), on_nonfinite="reset")
    assert report.resets["non-finite"] == 2


def test_a_snapshot_never_holds_nan(hidden: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with StepLoop.open(hidden) as loop:
        with pytest.raises(RunError, match="frame 9: h: the model returned NaN or Inf"):
            run_stream(loop, FrameSource("frames", [BAD] * 20), snapshot=path, snapshot_every=10)
        assert not path.exists()


@pytest.fixture
def hidden(write_model: Model, tmp_path: Path) -> Path:
    """y = x, h' = h + x: the state does not affect the output."""
    spec = TensorSpec(name="x", shape=("batch", 3, "height", "width"), layout="NCHW")
    contract = StepContract(
        inputs=(spec,),
        outputs=(TensorSpec(name="y", shape=spec.shape, layout="NCHW"),),
        states=(StateSpec(name="h", shape=spec.shape),),
    )
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Add", ["state_in.h", "x"], ["state_out.h"])]
    return write_model(tmp_path / "hidden.onnx", contract, nodes)


@pytest.mark.parametrize("start", [1, 56, 71, 100], ids=["1", "at a cut", "at a gap", "at the end"])
def test_resumed_run_equals_an_uninterrupted_one(denoiser_onnx: Path, tmp_path: Path, start: int) -> None:
    """With every reset policy that depends on frames, over the five scenes of a real clip."""
    frames = read_clip("bikes", shrink=4)[20:120]
    path = tmp_path / "state.safetensors"

    def run(loop: StepLoop, name: str, **options: Any) -> StreamReport:
        times = [number / 25 + (number > 70) for number in range(len(frames))]
        source = FrameSource("frames", frames, times=times)
        options |= {"reset_every": 33, "reset_gap": 0.5, "reset_on_cut": True}
        return run_stream(loop, source, ArraySink(tmp_path / name), **options)

    with StepLoop.open(denoiser_onnx) as loop:
        report = run(loop, "whole.npy")
        assert report.resets == {"every": 3, "gap": 1, "cut": 2, "size": 0, "demand": 0, "non-finite": 0}
        run(loop, "first.npy", limit=start, snapshot=path, snapshot_every=1000)
    with StepLoop.open(denoiser_onnx) as loop:
        report = run(loop, "rest.npy", snapshot=path, resume=True)
    assert (report.first_frame, report.frames) == (start, 100 - start)
    whole = np.load(tmp_path / "whole.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "first.npy"), whole[:start])
    if start < 100:
        np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), whole[start:])


def test_a_shorter_input_cannot_be_resumed(accumulator: Model, tmp_path: Path) -> None:
    snapshot = tmp_path / "state.safetensors"
    with StepLoop.open(accumulator()) as loop:
        run_stream(loop, FrameSource("frames", clip(5)), snapshot=snapshot)
        with pytest.raises(RunError, match="ends at frame 3, before frame 5"):
            run_stream(loop, FrameSource("frames", clip(3)), snapshot=snapshot, resume=True)


def test_a_live_source_just_goes_on(accumulator: Model, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    source = FrameSource("frames", clip(3))
    source.live = True
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, FrameSource("frames", clip(7)), snapshot=path, snapshot_every=5)
        assert (report.snapshots, report.failed_snapshots) == (2, 0)
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, source, ArraySink(tmp_path / "out.npy"), snapshot=path, resume=True)
    assert (report.first_frame, report.frames) == (7, 3)
    assert np.load(tmp_path / "out.npy")[:, 0, 0, 0].tolist() == [8, 9, 10]


def test_a_snapshot_that_cannot_be_written_does_not_end_the_stream(
    accumulator: Model, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    options = {"snapshot": folder / "state.safetensors", "snapshot_every": 2}
    options["progress"] = lambda _: shutil.rmtree(folder, ignore_errors=True)
    with StepLoop.open(accumulator()) as loop:
        report = run_stream(loop, FrameSource("frames", clip(5)), ArraySink(tmp_path / "out.npy"), **options)
    assert (report.snapshots, report.failed_snapshots) == (0, 3)
    assert len(np.load(tmp_path / "out.npy")) == 5
    assert "frame 2: snapshot not written" in logged.text


def test_a_second_signal_within_a_frame_leaves_the_last_snapshot(accumulator: Model, tmp_path: Path) -> None:
    """The states may be those before or after the interrupted frame, so no snapshot is written."""
    path, control = tmp_path / "state.safetensors", RunControl()
    with StepLoop.open(accumulator()) as loop:
        step, calls = loop.step_async, []

        def interrupted(**inputs: Any) -> Any:
            calls.append(step(**inputs))
            if len(calls) == 4:
                control.stop()
                raise KeyboardInterrupt
            return calls[-1]

        loop.step_async = interrupted  # type: ignore[method-assign]
        options = {"snapshot": path, "snapshot_every": 2, "control": control}
        report = run_stream(loop, FrameSource("frames", clip(9)), ArraySink(tmp_path / "out.npy"), **options)
        assert (report.frames, report.stopped, report.snapshots) == (3, "interrupted", 1)
        assert loop.restore(path).frame == 2
    assert len(np.load(tmp_path / "out.npy")) == 3
