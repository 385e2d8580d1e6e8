"""Conversion of pixels in the graph against the same arithmetic in NumPy, and against the float form of a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepcell import StepLoop
from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import ExportError, ParityError, StepcellError, UsageError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.exporter import fuse
from stepcell.exporter.step_onnx.graph import embed_contract
from stepcell.exporter.step_onnx.pixels_in_graph import check
from stepcell.exporter.step_onnx.pixels_in_graph.check import with_pixels_in_graph
from stepcell.exporter.step_onnx.pixels_in_graph.convert import pixels_in_graph
from stepcell.onnx_model import changes_since_export, read_onnx
from stepcell.pixels import as_chw
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.postprocess import OutputPostprocessor, to_pixels
from stepcell.runtime.media.preprocess import Preprocessor
from stepcell.runtime.streams.run import run_streams
from tests.exporter.step_onnx.pixels_in_graph.smoother import SMOOTHING, smoother, written

Array = np.ndarray[Any, Any]
STEPS = 32


def frames(*shape: int) -> Array:
    """Frames of every value, with edges that padding and a wrong order of axes would change."""
    return np.random.default_rng(0).integers(0, 256, (STEPS, *shape), np.uint8)


def smoothed(clip: Array, spec: TensorSpec, multiple: int, pool: int) -> Array:
    """What the smoother makes of pixels (T, N, H, W, C) in float64: bytes, padded, scaled and cropped by hand."""
    low, high = spec.range or (0.0, 1.0)
    mean, std = np.array(spec.mean or (0.0,)), np.array(spec.std or (1.0,))
    height, width = clip.shape[2:4]
    state, results = 0.0, []
    for batch in clip:
        order = batch[..., ::-1] if spec.channels == "BGR" else batch
        x = (low + order / 255 * (high - low) - mean) / std
        x = np.pad(x, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)), mode="edge")
        state = SMOOTHING * state + (1 - SMOOTHING) * x
        y = state.reshape(len(x), x.shape[1] // pool, pool, x.shape[2] // pool, pool, x.shape[3]).mean((2, 4))
        y = y[:, : -(-height * y.shape[1] // x.shape[1]), : -(-width * y.shape[2] // x.shape[2])]
        shown = np.rint(np.clip((y - low) / (high - low) * 255, 0, 255))
        results.append(shown[..., ::-1] if spec.channels == "BGR" else shown)
    return np.stack(results)


@pytest.mark.parametrize(
    ("options", "multiple", "pool"),
    [
        ({}, 1, 1),
        ({"layout": "NHWC"}, 1, 1),
        ({"channels": 1}, 4, 1),
        ({"channels": 4, "layout": "NHWC"}, 8, 1),
        ({"range": (-1.0, 1.0)}, 8, 2),
        ({"range": (0.0, 255.0), "opset": 13}, 2, 2),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.9, 1.2, 1.1)}, 1, 1),
        ({"dtype": "float16"}, 8, 4),
        ({"order": "BGR", "mean": (0.1, 0.2, 0.3), "layout": "NHWC"}, 4, 1),
        ({"order": "BGR", "dtype": "float16"}, 1, 1),
    ],
)
def test_bytes_are_those_of_the_arithmetic_by_hand(
    tmp_path: Path, options: dict[str, Any], multiple: int, pool: int
) -> None:
    channels = options.get("channels", 3)
    model, contract = smoother(pool=pool, **options)
    x = msgspec.structs.replace(contract.inputs[0], pad_multiple=multiple)
    changed, result = with_pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(x,)))
    onnx.checker.check_model(changed, full_check=True)

    clip = frames(3, 13, 22, channels)
    expected = smoothed(clip, x, multiple, pool)
    with StepLoop.open(written(changed, tmp_path / "bytes.onnx")) as loop:
        got = [loop.step(x=batch) for batch in clip]
    shown = np.stack([each["y"] for each in got])
    assert shown.dtype == np.uint8
    assert shown.shape == expected.shape
    apart = np.abs(shown - expected)
    print(f"worst {apart.max():g}, {np.mean(apart > 0):.3%} of the bytes differ")
    # a float16 model rounds to 1/2048 of the range, a float32 one only at a boundary between two levels
    assert apart.max() <= 1
    assert np.mean(apart > 0) < (0.1 if x.dtype == "float16" else 1e-3)
    assert result.outputs[1].name == "y.mean"
    assert [spec.layout for spec in (*result.inputs, *result.outputs)] == ["NHWC", "NHWC", None]
    assert len(np.unique([each["y.mean"] for each in got])) > STEPS


@pytest.fixture(scope="module", params=["float16", "float32"])
def both(
    request: pytest.FixtureRequest, denoiser_onnx: Path, denoiser_onnx_float32: Path, tmp_path_factory: Any
) -> tuple[Path, Path]:
    """The denoiser with floats, and with bytes."""
    source = denoiser_onnx if request.param == "float16" else denoiser_onnx_float32
    target: Path = tmp_path_factory.mktemp("bytes") / "bytes.onnx"
    fuse(source, target, pixel_dtype="uint8")
    return source, target


def test_denoiser_of_bytes_is_within_one_level_of_the_one_of_floats(both: tuple[Path, Path]) -> None:
    clip = frames(3, 31, 45, 3)
    worst: dict[str, float] = {"y": 0, "h": 0}
    with StepLoop.open(both[0]) as floats, StepLoop.open(both[1], slots=3) as slots, StepLoop.open(both[1]) as whole:
        x, y = floats.contract.inputs[0], floats.contract.outputs[0]
        convert = Preprocessor(x, clip[0, 0])
        names = [slots.attach() for _ in range(3)]
        for t, batch in enumerate(clip):
            if t == STEPS // 2:
                whole.load_state(whole.state())
            truth = floats.step(x=np.concatenate([convert(frame) for frame in batch]))["y"][:, :, :31, :45]
            expected = np.stack([to_pixels(y, as_chw(row[None], "NCHW")) for row in truth])
            got = whole.step(x=batch)
            found = slots.step_slots({slot: {"x": batch[i : i + 1]} for i, slot in enumerate(names)})
            for i, slot in enumerate(names):
                np.testing.assert_array_equal(found[slot]["y"][0], got["y"][i])
            worst["y"] = max(worst["y"], float(np.abs(got["y"].astype(int) - expected).max()))
            worst["h"] = max(worst["h"], float(np.abs(whole.state()["h"] - floats.state()["h"]).max()))
            np.testing.assert_allclose(got["y.mean"], truth.mean((1, 2, 3), dtype=np.float64), atol=1e-4)
    print(f"worst over {STEPS} steps fed back: {worst}")
    assert worst["y"] <= 1
    assert worst["h"] < 1e-5
    assert whole.contract.states[0].shape == (
        "batch",
        8,
        "(height + 1) // 2 * 2 // 2",
        "(width + 1) // 2 * 2 // 2",
    )


def test_file_is_unchanged_since_its_export_and_says_what_it_converts(both: tuple[Path, Path]) -> None:
    before, after = (read_onnx(path) for path in both)
    assert changes_since_export(after) == []
    x, parity = after.contract.inputs[0], after.contract.parity
    assert (x.dtype, x.range, x.pad_multiple, x.channels) == ("uint8", (0, 255), 1, "RGB")
    assert x.converts
    assert (x.converts.dtype, x.converts.layout, x.converts.pad_multiple) == (before.contract.precision, "NCHW", 2)
    assert parity is not None
    assert parity.max_abs_error["y"] <= 1
    assert "y" not in parity.rms_error
    assert "the float form" in parity.reference


def test_builds_with_tensorrt_rtx(both: tuple[Path, Path], tmp_path: Path) -> None:
    options = BuildOptions(opt_shapes={"x": (1, 33, 41, 3)}, compute_capabilities=("8.6",))
    info = build_engine(both[1], tmp_path / "bytes.engine", options)
    assert info.contents.profiles["state_in.h"].opt == (1, 8, 17, 21)
    assert info.contents.contract.inputs[0].dtype == "uint8"


def test_frames_pass_through_run_as_they_are(both: tuple[Path, Path], tmp_path: Path) -> None:
    clip = frames(31, 45, 3)[:5]
    np.save(tmp_path / "clip.npy", clip)
    run_streams(both[1], tmp_path / "clip.npy", tmp_path / "out.npy")
    with StepLoop.open(both[1]) as loop:
        expected = [loop.step(x=frame[None])["y"][0] for frame in clip]
        spec = loop.contract.inputs[0]
        convert = Preprocessor(spec, clip[0])
        assert np.shares_memory(convert(clip[0]), clip)
        video = open_sink(str(tmp_path / "out.mkv"), Fraction(25))
        assert np.shares_memory(OutputPostprocessor(loop.contract, video)(expected[0][None], convert), expected[0])
        video.abandon()
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_nan_that_bytes_cannot_show_ends_a_run(tmp_path: Path) -> None:
    model, contract = smoother()
    model.graph.node[-1].op_type = "Log"  # of a black frame: -Inf
    changed, result = pixels_in_graph(model, contract)
    embed_contract(changed, result)
    path = written(changed, tmp_path / "log.onnx")
    clip = np.full((3, 8, 8, 3), 255, np.uint8)
    clip[0, 0, 0, 0] = 0
    np.save(tmp_path / "clip.npy", clip)
    with pytest.raises(StepcellError, match=r"y\.mean: the model returned NaN or Inf"):
        run_streams(path, tmp_path / "clip.npy", tmp_path / "out.npy")


def spec_of(**fields: Any) -> TensorSpec:
    return TensorSpec(**{"name": "x", "shape": ("batch", 3, "height", "width"), "layout": "NCHW", **fields})


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        (spec_of(), "the range of x is undefined", "--pixels uint8 --range x:0,1"),
        (spec_of(dtype="uint8", range=(0.0, 255.0)), "x is uint8 already", "omit it"),
        (
            spec_of(events=EventSpec(representation="voxel_grid", bins=3, window=EventWindow(size=30_000, unit="us"))),
            "x is made of events, not of pixels",
            "omit it",
        ),
        (spec_of(layout=None), "no input is a picture", "--layout NHWC"),
        (spec_of(shape=("batch", 64, "height", "width"), range=(0.0, 1.0)), "no input is a picture", "--layout NHWC"),
    ],
)
def test_what_cannot_be_bytes_is_refused(spec: TensorSpec, message: str, hint: str) -> None:
    model, contract = smoother()
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(spec,)))
    assert hint in str(caught.value.hint)


def test_old_opset_and_sizes_that_cannot_be_padded_are_refused() -> None:
    model, contract = smoother()
    model.opset_import[0].version = 10
    with pytest.raises(ExportError, match="needs opset 11, the file has 10"):
        pixels_in_graph(model, contract)
    model.opset_import[0].version = 20
    doubled = spec_of(name="z", shape=("batch", 3, "height * 2", "width * 2"), range=(0.0, 1.0), pad_multiple=2)
    with pytest.raises(ExportError, match=r"z: a size of 'height \* 2' cannot be padded"):
        pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(*contract.inputs, doubled)))


def test_output_without_a_range_stays_and_is_cropped(caplog: pytest.LogCaptureFixture) -> None:
    model, contract = smoother(pool=2)
    x = msgspec.structs.replace(contract.inputs[0], pad_multiple=8)
    y = msgspec.structs.replace(contract.outputs[0], range=None, channels=None)
    changed, result = with_pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(x,), outputs=(y,)))
    assert "y: stays float32, its range is undefined" in caplog.text
    assert [(spec.name, spec.dtype) for spec in result.outputs] == [("y", "float32")]
    session = check.OnnxSession(changed.SerializeToString(), "test")
    sizes = {"x": np.zeros((1, 13, 22, 3), np.uint8), "state_in.h": np.zeros((1, 3, 16, 24), np.float32)}
    assert session(sizes)["y"].shape == (1, 3, 7, 11)
    assert result.bind({"x": (1, 13, 22, 3)})
    assert resolved(result.outputs[0].shape, 13, 22) == [1, 3, 7, 11]


def resolved(shape: Sequence[int | str], height: int, width: int) -> list[int]:
    from stepcell.dims import resolve

    return list(resolve(shape, {"batch": 1, "height": height, "width": width}))


def test_a_wrong_conversion_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: onnx.ModelProto, contract: StepContract, _: object) -> tuple[onnx.ModelProto, StepContract]:
        changed, result = pixels_in_graph(model, contract)
        rounding = next(node for node in changed.graph.node if node.op_type == "Clip")
        low = next(each for each in changed.graph.initializer if each.name == rounding.input[1])
        low.CopyFrom(numpy_helper.from_array(np.array(3, np.float32), low.name))
        return changed, result

    monkeypatch.setattr(check, "pixels_in_graph", wrong)
    with pytest.raises(ParityError, match="y: differs from the float form"):
        with_pixels_in_graph(*smoother())


def test_graph_inside_a_node_reads_the_converted_input() -> None:
    model, contract = smoother()
    branch = helper.make_graph(
        [helper.make_node("Mul", ["x", "new"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    condition = helper.make_tensor("always", TensorProto.BOOL, [], [1])
    model.graph.initializer.append(condition)
    model.graph.node[1].CopyFrom(helper.make_node("If", ["always"], ["taken"], then_branch=branch, else_branch=branch))
    changed, _ = with_pixels_in_graph(model, contract)
    onnx.checker.check_model(changed, full_check=True)
