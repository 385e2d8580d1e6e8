"""NV12 in the graph against the standard's formula by hand, against the float form, and as `run` feeds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from stepcell import Nv12, StepLoop
from stepcell.errors import ExportError, InputError, ParityError, StepcellError, UsageError
from stepcell.exporter import fuse
from stepcell.exporter.step_onnx.contract import sizes_for_check
from stepcell.exporter.step_onnx.graph import embed_contract
from stepcell.exporter.step_onnx.pixels_in_graph import check
from stepcell.exporter.step_onnx.pixels_in_graph.check import with_pixels_in_graph
from stepcell.exporter.step_onnx.pixels_in_graph.convert import pixels_in_graph
from stepcell.nv12 import nv12_planes
from stepcell.onnx_model import changes_since_export, read_onnx
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.streams.run import run_streams
from tests.exporter.step_onnx.pixels_in_graph.smoother import SMOOTHING, smoother, written
from tests.runtime.media.clips import write_clip

Array = np.ndarray[Any, Any]
STEPS = 8
HD = Nv12(matrix="bt709", range="limited")


def by_hand(frame: Array, kr: float, kb: float, *, full: bool) -> Array:
    """RGB (H, W, 3) of one frame in float64: equations 30 to 39 of ITU-T H.273, inverted."""
    luma, chroma = nv12_planes(frame.astype(np.float64))
    y = luma / 255 if full else (luma - 16) / 219
    cb, cr = (np.kron(chroma[..., axis] - 128, np.ones((2, 2))) / (255 if full else 224) for axis in (0, 1))
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], -1), 0, 1) * 255


@pytest.mark.parametrize(
    ("how", "weights", "options", "multiple"),
    [
        (HD, (0.2126, 0.0722), {}, 1),
        (Nv12(matrix="bt601", range="full"), (0.299, 0.114), {"layout": "NHWC"}, 4),
        (Nv12(matrix="bt2020", range="limited"), (0.2627, 0.0593), {"order": "BGR", "opset": 13}, 8),
        (Nv12(matrix="smpte240m", range="limited"), (0.212, 0.087), {"layout": "CHW"}, 1),
        (Nv12(matrix="fcc", range="full"), (0.30, 0.11), {"mean": (0.1, 0.2, 0.3), "std": (0.9, 1.1, 1.2)}, 4),
    ],
)
def test_nv12_is_the_formula_by_hand(
    tmp_path: Path, how: Nv12, weights: tuple[float, float], options: dict[str, Any], multiple: int
) -> None:
    model, contract = smoother(**options)
    x = msgspec.structs.replace(contract.inputs[0], pad_multiple=multiple)
    changed, result = with_pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(x,)), how)
    onnx.checker.check_model(changed, full_check=True)
    alone = "N" not in str(x.layout)
    assert result.inputs[0].shape[-2:] == ("height * 3 // 2", "width")

    clip = np.random.default_rng(0).integers(0, 256, (STEPS, 21, 22), np.uint8)
    mean, std = np.array(x.mean or (0.0,)), np.array(x.std or (1.0,))
    state: Any = 0.0
    worst = 0.0
    with StepLoop.open(written(changed, tmp_path / "nv12.onnx")) as loop:
        for frame in clip:
            rgb = by_hand(frame, *weights, full=how.range == "full") / 255
            state = SMOOTHING * state + (1 - SMOOTHING) * ((rgb - mean) / std)
            expected = np.rint(np.clip(state, 0, 1) * 255)
            got = loop.step(x=frame if alone else frame[None])["y"].reshape(14, 22, 3)
            worst = max(worst, float(np.abs(got - expected).max()))
    assert worst <= 1


@pytest.fixture(scope="module")
def nv12_denoiser(denoiser_onnx: Path, tmp_path_factory: Any) -> Path:
    target: Path = tmp_path_factory.mktemp("nv12") / "nv12.onnx"
    fuse(denoiser_onnx, target, pixel_dtype=HD)
    return target


def test_file_says_what_it_takes_and_batches_as_the_float_form(nv12_denoiser: Path) -> None:
    model = read_onnx(nv12_denoiser)
    assert changes_since_export(model) == []
    (x,) = model.contract.inputs
    assert x.converts
    assert (x.shape, x.layout, x.converts.nv12) == (("batch", "height * 3 // 2", "width"), None, HD)
    parity = model.contract.parity
    assert parity is not None
    assert parity.max_abs_error["y"] <= 1
    assert all(sizes["height"] % 2 == sizes["width"] % 2 == 0 for sizes in sizes_for_check(model.contract))
    clip = np.random.default_rng(1).integers(0, 256, (STEPS, 3, 33, 26), np.uint8)
    with StepLoop.open(nv12_denoiser) as whole, StepLoop.open(nv12_denoiser, slots=3) as slots:
        names = [slots.attach() for _ in range(3)]
        for batch in clip:
            got = whole.step(x=batch)
            found = slots.step_slots({slot: {"x": batch[i : i + 1]} for i, slot in enumerate(names)})
            for i, slot in enumerate(names):
                np.testing.assert_array_equal(found[slot]["y"][0], got["y"][i])
        assert got["y"].shape == (3, 22, 26, 3)
        whole.reset()
        for shape in ((1, 34, 26), (1, 33, 25)):  # an odd height, an odd width
            with pytest.raises(InputError, match=r"NV12 of H x W pixels, both even"):
                whole.step(x=np.zeros(shape, np.uint8))


@pytest.mark.parametrize(("how", "shape"), [("uint8", (1, 41, 53, 3)), (HD, (1, 60, 52))])
def test_ncnn_converts_as_onnx_runtime_does(how: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    model, contract = smoother()
    x = msgspec.structs.replace(contract.inputs[0], pad_multiple=8)
    changed, _ = with_pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(x,)), how)
    path = written(changed, tmp_path / "bytes.onnx")
    with StepLoop.open(path, backend="ncnn") as ours, StepLoop.open(path, backend="onnxruntime") as theirs:
        for frame in np.random.default_rng(0).integers(0, 256, (STEPS, *shape), np.uint8):
            found, expected = ours.step(x=frame), theirs.step(x=frame)
            assert found["y"].shape == expected["y"].shape
            assert np.abs(found["y"].astype(int) - expected["y"]).max() <= 1
            np.testing.assert_allclose(found["y.mean"], expected["y.mean"], rtol=1e-6)
    assert "ncnn" in ours.description


def test_the_mean_of_a_large_picture_is_exact(tmp_path: Path) -> None:
    model, contract = smoother()
    changed, result = pixels_in_graph(model, contract)
    embed_contract(changed, result)
    with StepLoop.open(written(changed, tmp_path / "bytes.onnx"), backend="onnxruntime") as loop:
        frame = np.random.default_rng(0).integers(0, 256, (1, 1080, 1920, 3), np.uint8)
        mean = loop.step(x=frame)["y.mean"]
    np.testing.assert_allclose(mean, frame.mean() / 255 * (1 - SMOOTHING), rtol=1e-5)  # 1e-3 in one sum


def test_builds_with_tensorrt_rtx(nv12_denoiser: Path, tmp_path: Path) -> None:
    options = BuildOptions(opt_shapes={"x": (1, 48, 42)}, compute_capabilities=("8.6",))
    info = build_engine(nv12_denoiser, tmp_path / "nv12.engine", options)
    assert info.contents.profiles["state_in.h"].opt == (1, 8, 16, 21)


@pytest.fixture(scope="module")
def video(tmp_path_factory: Any) -> Path:
    """A clip of BT.601, limited range, which it does not state."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, (9, 11, 3), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(5)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", blocks)


def stepped(denoiser: Path, clip: Path, folder: Path, pixel_dtype: Any) -> Array:
    model = folder / "model.onnx"
    fuse(denoiser, model, pixel_dtype=pixel_dtype, overwrite=True)
    run_streams(model, clip, folder / "out.npy", overwrite=True)
    return np.load(folder / "out.npy").astype(int)


def test_a_video_gives_what_rgb_of_swscale_gives(
    denoiser_onnx: Path, video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rgb = stepped(denoiser_onnx, video, tmp_path, "uint8")
    same = stepped(denoiser_onnx, video, tmp_path, Nv12(matrix="bt601", range="limited"))
    assert "converted on the host" not in caplog.text
    apart = np.abs(same - rgb)
    print(f"worst {apart.max()}, mean {apart.mean():.3f} levels")
    assert apart.max() <= 4  # swscale itself is up to 3 levels from the formula
    assert apart.mean() < 1.5
    assert stepped(denoiser_onnx, video, tmp_path, Nv12(matrix="bt709", range="full")).shape == rgb.shape
    assert "takes NV12 of BT.709, full range" in caplog.text


def test_arrays_cuts_and_sizes(nv12_denoiser: Path, video: Path, tmp_path: Path) -> None:
    clip = np.random.default_rng(2).integers(0, 256, (5, 36, 32), np.uint8)
    clip[:, :24] = np.linspace(0, 255, 24, dtype=np.uint8)[:, None]  # luma of the same picture
    clip[3:, :24] = np.linspace(0, 255, 32, dtype=np.uint8)  # and of another
    np.save(tmp_path / "clip.npy", clip)
    report = run_streams(nv12_denoiser, tmp_path / "clip.npy", tmp_path / "out.npy", reset_on_cut=True)
    assert report.streams[0].frame_size == (32, 24)
    assert report.streams[0].resets["cut"] == 1
    np.save(tmp_path / "rgb.npy", np.zeros((2, 24, 32, 3), np.uint8))
    with pytest.raises(StepcellError, match="takes NV12") as caught:
        run_streams(nv12_denoiser, tmp_path / "rgb.npy")
    assert "--pixels uint8" in str(caught.value.hint)
    resized = run_streams(nv12_denoiser, video, tmp_path / "small.npy", resize="40x16,fit")
    assert resized.streams[0].frame_size == (40, 16)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"channels": None, "range": None},
            UsageError,
            "--matrix bt709 --coded-range limited: the range",
        ),
        ({"shape": ("batch", 1, "height", "width"), "channels": None}, UsageError, "NV12 is of three channels"),
        ({"shape": ("batch", 3, 35, 64)}, ExportError, "64x35, and NV12 has an even height and width"),
    ],
)
def test_what_cannot_be_nv12_is_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    model, contract = smoother()
    x = msgspec.structs.replace(contract.inputs[0], **fields)
    with pytest.raises(error, match=re.escape(message)):
        pixels_in_graph(model, msgspec.structs.replace(contract, inputs=(x,)), HD)


def test_nv12_twice_and_an_odd_example(tmp_path: Path) -> None:
    model, contract = smoother()
    contract = msgspec.structs.replace(contract, example={"batch": 1, "height": 15, "width": 24})
    changed, result = with_pixels_in_graph(model, contract, HD)
    assert result.example == {"batch": 1, "height": 16, "width": 24}
    with pytest.raises(UsageError, match="x is NV12 already"):
        pixels_in_graph(changed, result, HD)


def test_a_wrong_matrix_in_the_graph_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, contract: Any, pixel_dtype: Any) -> Any:
        changed, _ = pixels_in_graph(model, contract, Nv12(matrix="bt601", range="limited"))
        return changed, pixels_in_graph(model, contract, pixel_dtype)[1]

    monkeypatch.setattr(check, "pixels_in_graph", wrong)
    with pytest.raises(ParityError, match="y: differs from the float form"):
        with_pixels_in_graph(*smoother(), HD)
