"""What the pixels of a model are, on the command line: refused while undefined, declared in the file or for a run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from stepcell.onnx_model import read_onnx
from tests.cli.command import call

Make = Callable[..., Path]


@pytest.fixture
def frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:  # type: ignore[type-arg]
    """One frame of red, green and blue levels as clip.npy; the models add up, so one frame shows what they are fed."""
    monkeypatch.chdir(tmp_path)
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(1, 2, 4, 3) * 10
    np.save("clip.npy", pixels)
    return pixels


def test_undefined_range_is_refused_with_two_commands_that_work(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=None)
    arguments = ["run", model.name, "--input", "clip.npy", "--output", "out.npy"]
    result = call(*arguments)
    assert result.exit_code == 2
    assert "x: the range of its pixel values is undefined" in result.stderr
    assert not Path("out.npy").exists()
    said = result.stderr.partition("hint:")[2]
    fuse, run = (said[said.index(start) :].partition(";")[0] for start in ("stepcell fuse", "stepcell run"))
    assert shlex.split(run)[1:] == [*arguments, "--range", "0,1"]

    assert call(*shlex.split(run)[1:]).exit_code == 0
    expected = frames.transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(np.load("out.npy"), expected, rtol=0, atol=1e-7)
    declared = call(*shlex.split(fuse)[1:])
    assert declared.exit_code == 0, declared.stderr
    assert "x: range undefined -> 0 to 1, channels none -> RGB" in declared.stderr
    assert call("run", "sum-declared.onnx", "--input", "clip.npy", "--output", "again.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("again.npy"), np.load("out.npy"))


def test_declaring_in_a_file_keeps_everything_else(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = onnx.load(accumulator(range=None))
    model.metadata_props.add(key="author", value="someone")
    model.doc_string = "kept"
    onnx.save(model, "sum.onnx")
    options = ["--range", "0,1", "--range", "y:0,255", "--mean", "0.5", "--std", "0.2,0.3,0.4", "--channels", "BGR"]
    result = call("fuse", "sum.onnx", "-o", "declared.onnx", *options)
    assert result.exit_code == 0, result.stderr
    after = onnx.load("declared.onnx")
    assert after.graph == model.graph
    assert after.doc_string == "kept"
    assert [entry.key for entry in after.metadata_props] == [entry.key for entry in model.metadata_props]
    old, new = read_onnx(Path("sum.onnx")).contract, read_onnx(Path("declared.onnx")).contract
    (x,), (y,) = new.inputs, new.outputs
    assert (x.range, x.mean, x.std, x.channels) == ((0, 1), (0.5,), (0.2, 0.3, 0.4), "BGR")
    assert (y.range, y.mean, y.channels) == ((0, 255), None, "BGR")
    assert new.states == old.states
    shown = call("inspect", "declared.onnx").stdout
    assert "range 0 to 1, mean 0.5, std 0.2 0.3 0.4, BGR" in " ".join(shown.split())
    assert "range undefined" in call("inspect", "sum.onnx").stdout


def test_bgr_is_exchanged_on_both_sides(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=(0.0, 1.0), channels="BGR")
    assert call("run", model.name, "-i", "clip.npy", "-o", "out.npy").exit_code == 0
    np.testing.assert_allclose(np.load("out.npy"), frames.transpose(0, 3, 1, 2)[:, ::-1] / 255, rtol=0, atol=1e-7)
    result = call("run", model.name, "-i", "clip.npy", "-o", "rgb.npy", "--channels", "RGB")
    assert "x: channels BGR -> RGB (for this run)" in result.stderr
    np.testing.assert_array_equal(np.load("rgb.npy"), np.load("out.npy")[:, ::-1])
    pytest.importorskip("av")
    assert call("run", model.name, "-i", "clip.npy", "-o", "pictures").exit_code == 0
    grey_of_rgb = call("run", "sum.onnx", "-i", "pictures", "-o", "back.npy", "--channels", "RGB")
    assert grey_of_rgb.exit_code == 0
    np.testing.assert_allclose(np.load("back.npy"), frames.transpose(0, 3, 1, 2) / 255, rtol=0, atol=1e-7)


def test_pictures_of_a_model_without_a_layout_need_one(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(shape=(1, 2, 4, 3), layout=None, range=None)
    refused = call("run", model.name, "-i", "clip.npy", "-o", "out.npy")
    assert refused.exit_code == 1
    assert "--layout NHWC" in refused.stderr
    result = call("run", model.name, "-i", "clip.npy", "-o", "out.npy", "--layout", "NHWC", "--range", "0,1")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_allclose(np.load("out.npy"), frames / 255, rtol=0, atol=1e-7)


def test_tensors_need_no_range_and_their_pictures_do(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=None)
    np.save("scaled.npy", (frames.transpose(0, 3, 1, 2) / 255).astype(np.float32))
    assert call("run", model.name, "-i", "scaled.npy", "-o", "out.npy").exit_code == 0
    pytest.importorskip("av")
    refused = call("run", model.name, "-i", "scaled.npy", "-o", "pictures")
    assert refused.exit_code == 2
    assert "y: the range of its pixel values is undefined" in refused.stderr
    assert "--range y:0,1" in refused.stderr
    assert not Path("pictures").exists()
    assert call("run", model.name, "-i", "scaled.npy", "-o", "pictures", "--range", "y:0,1").exit_code == 0


def test_wrong_values_are_usage_errors(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=None)
    for options, message in (
        (["--range", "1,0"], "low < high"),
        (["--range", "0,1", "--mean", "0.5,0.5"], "mean: expected 3 numbers"),
        (["--mean", "0.5"], "range, which is undefined"),
        (["--range", "0,1", "--mean", "124,116,104"], "lies outside the range 0 to 1"),
        (["--channels", "RGBA"], "--channels: expected RGB or BGR"),
    ):
        for command in (["run", model.name, "-i", "clip.npy"], ["fuse", model.name, "-o", "out.onnx"]):
            result = call(*command, *options)
            assert result.exit_code == 2, result.stderr
            assert message in result.stderr
    assert not Path("out.onnx").exists()


def test_verify_takes_a_declaration_and_refuses_without(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=None)
    np.save("clip.npy", np.repeat(frames, 4, 0))
    arguments = ["verify", model.name, "--input", "clip.npy", "--steps", "4", "--warm-up", "0"]
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "x: the range of its pixel values is undefined" in refused.stderr
    assert "x: range undefined -> 0 to 1" in call(*arguments, "--range", "0,1").stderr


def test_pixels_in_the_graph(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=None)
    refused = call("fuse", model.name, "-o", "bytes.onnx", "--pixels", "uint8")
    assert refused.exit_code == 2
    assert "the range of x is undefined" in refused.stderr
    said = " ".join(refused.stderr.partition("such as")[2].split())
    assert not Path("bytes.onnx").exists()

    made = call("fuse", model.name, "-o", "bytes.onnx", *shlex.split(said))
    assert made.exit_code == 0, made.stderr
    assert "pixels are converted in the graph" in made.stderr
    assert "converted in the graph to (float32, NCHW, range 0 to 1, RGB)" in call("inspect", "bytes.onnx").stdout
    assert call("run", "bytes.onnx", "--input", "clip.npy", "--output", "out.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("out.npy"), frames)
    again = call("fuse", "bytes.onnx", "-o", "twice.onnx", "--pixels", "uint8")
    assert (again.exit_code, "x is uint8 already" in again.stderr) == (2, True)
    module = call("verify", "bytes.onnx", "--against", "weights.pth")
    assert module.exit_code == 2
    assert "the file takes bytes, and the module floats" in module.stderr
    floats = np.zeros((1, 3, 2, 4), np.float32)
    np.save("floats.npy", floats)
    given = call("run", "bytes.onnx", "--input", "floats.npy")
    assert given.exit_code == 1
    assert "the model takes pixels, bytes of 0 to 255, the frames are float32" in given.stderr


def test_nv12_needs_its_matrix_and_its_range(accumulator: Make, frames: np.ndarray) -> None:  # type: ignore[type-arg]
    model = accumulator(range=(0.0, 1.0))
    alone = call("fuse", model.name, "-o", "nv12.onnx", "--pixels", "uint8", "--matrix", "bt709")
    assert (alone.exit_code, "--matrix: is for --pixels nv12" in alone.stderr) == (2, True)
    refused = call("fuse", model.name, "-o", "nv12.onnx", "--pixels", "nv12", "--matrix", "bt601")
    assert refused.exit_code == 2
    assert "--pixels nv12: needs --coded-range" in refused.stderr
    said = " ".join(refused.stderr.partition("such as")[2].partition("(")[0].split())
    made = call("fuse", model.name, "-o", "nv12.onnx", *shlex.split(said))
    assert made.exit_code == 0, made.stderr
    shown = " ".join(call("inspect", "nv12.onnx").stdout.split())
    assert "NV12, BT.601, limited range, converted in the graph to (float32, NCHW, range 0 to 1" in shown
    grey = np.full((1, 3, 4), 128, np.uint8)
    grey[:, :2] = [[16, 235, 126, 126]]
    np.save("clip.npy", grey)
    assert call("run", "nv12.onnx", "--input", "clip.npy", "--output", "out.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("out.npy")[0, :, :, 1], [[0, 255, 128, 128]] * 2)
    repository = call("triton-repo", "nv12.onnx", "-o", "repository")
    assert "frames:    tensors" in repository.stderr
