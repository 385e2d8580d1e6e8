"""Rule for existing files that an output may replace."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import save

from stepcell.errors import UsageError
from stepcell.overwrite import (
    REFERENCE_KEY,
    SNAPSHOT_KEY,
    check_output,
    is_engine,
    is_exported_model,
    is_marked,
    is_no_model,
    is_reference,
    is_report,
    is_sidecar,
    is_snapshot,
)
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.video_writer import VideoSink
from stepcell.runtime.verify.report.plot import line_plot
from tests.cli.command import call

Model = Callable[..., Path]


def nothing(_: Path) -> bool:
    return False


def anything(_: Path) -> bool:
    return True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spelling", ["net.pth", "./net.pth", "sub/../net.pth", "symbolic", "hard", "sub/symbolic"])
def test_an_input_is_never_replaced_however_it_is_spelled(folder: Path, spelling: str) -> None:
    Path("net.pth").write_bytes(b"weights")
    Path("sub").mkdir()
    Path("symbolic").symlink_to("net.pth")
    Path("sub/symbolic").symlink_to(folder / "net.pth")
    os.link("net.pth", "hard")
    with pytest.raises(UsageError, match="also used as the checkpoint"):
        check_output(Path(spelling), anything, reads={Path("net.pth"): "the checkpoint"}, overwrite=True)


def test_an_input_that_does_not_exist_yet_counts_too(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--report out\.json: also used as --snapshot"):
        check_output(Path("out.json"), anything, reads={folder / "out.json": "--snapshot"}, option="--report")


def test_a_loop_of_links_and_names_that_are_no_files(folder: Path) -> None:
    Path("loop").symlink_to("loop")
    reads = {"loop": "--input", "rtsp://host/a": "--input", "x" * 5000: "--input", "a\0b": "--input"}
    check_output(Path("out.npy"), nothing, reads=reads)


def test_weights_beside_a_model_belong_to_it(folder: Path, accumulator: Model) -> None:
    path = accumulator("m.onnx")
    model = onnx.load(path)
    inner = onnx.helper.make_graph([], "inner", [], [], [numpy_helper.from_array(np.zeros(300, np.float32), "deep")])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(300, np.float32), "w"))
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    deep = model.graph.node[0].attribute[0].g.initializer[0]
    deep.data_location = onnx.TensorProto.EXTERNAL
    deep.external_data.append(onnx.StringStringEntryProto(key="location", value="deep.bin"))
    path.write_bytes(model.SerializeToString())
    Path("deep.bin").write_bytes(b"1234")
    for name in ("m.onnx.data", "deep.bin"):
        with pytest.raises(UsageError, match=f"{name}: belongs to the model"):
            check_output(Path(name), anything, reads={path: "the model"}, overwrite=True)


def test_what_belongs_to_an_engine(folder: Path) -> None:
    Path("m.engine").write_bytes(b"plan")
    Path("m.engine.json").write_bytes(msgspec.json.encode(sidecar()))
    Path("m.onnx").write_bytes(b"graph")
    for name in ("m.engine.json", "m.onnx"):
        with pytest.raises(UsageError, match="belongs to the model"):
            check_output(Path(name), anything, reads={"m.engine": "the model"}, overwrite=True)


@pytest.mark.parametrize("name", ["../m.onnx", "", ".", "a\0b", "a" * 5000])
def test_a_sidecar_that_names_no_file(folder: Path, name: str) -> None:
    Path("m.engine.json").write_bytes(msgspec.json.encode(sidecar() | {"onnx": name}))
    Path("m.engine").write_bytes(b"plan")
    Path("out.mp4").write_bytes(b"video")
    check_output(Path("out.mp4"), anything, reads={"m.engine": "the model"})


def test_pictures_of_an_input_folder(folder: Path) -> None:
    Path("frames").mkdir()
    Path("frames/0.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match="belongs to --input frames"):
        check_output(Path("frames/0.png"), anything, reads={"frames": "--input"}, overwrite=True)


def test_a_foreign_file_needs_overwrite_and_an_empty_one_does_not(folder: Path) -> None:
    Path("thesis").write_text("text")
    with pytest.raises(UsageError, match="thesis: exists already, and not as") as caught:
        check_output(Path("thesis"), nothing, reads={})
    assert "--overwrite" in str(caught.value.hint)
    check_output(Path("thesis"), nothing, reads={}, overwrite=True)
    Path("thesis").write_text("")
    check_output(Path("thesis"), nothing, reads={})
    check_output(Path("new"), nothing, reads={})


def sidecar() -> dict[str, Any]:
    return {"fingerprint": {}, "profiles": {}, "contract": {}, "onnx": "m.onnx"}


def test_kinds_are_told_apart_by_their_content(folder: Path, accumulator: Model) -> None:
    model = accumulator("ours.onnx")
    plain = onnx.load(model)
    del plain.metadata_props[:]
    plain.doc_string = "stepcell.contract"  # a mention is no contract
    onnx.save(plain, "plain.onnx")
    tensors = {"h": np.zeros(2, np.float32)}
    Path("snapshot.safetensors").write_bytes(save(tensors, {SNAPSHOT_KEY: "{}"}))
    Path("checkpoint.safetensors").write_bytes(save(tensors, {"format": SNAPSHOT_KEY}))
    Path("a.engine").write_bytes(b"plan")
    Path("a.engine.json").write_bytes(msgspec.json.encode(sidecar()))
    Path("b.engine").write_bytes(b"plan")
    Path("run.json").write_text('{"model": "m", "frames_per_second": 1}')
    Path("settings.json").write_text('{"name": 1}')
    Path("list.json").write_text("[1]")
    Path("timing.cache").write_bytes(b"TRT cache")
    Path("net.pth").write_bytes(b"PK\3\4")
    Path("net.bin").write_bytes(b"\x80\2}q\0.")
    ours = {
        is_exported_model: ["ours.onnx"],
        is_snapshot: ["snapshot.safetensors"],
        is_engine: ["a.engine"],
        is_sidecar: ["a.engine.json"],
        is_report: ["run.json"],
    }
    names = sorted(each.name for each in folder.iterdir())
    for recognise, expected in ours.items():
        assert [name for name in names if recognise(Path(name))] == expected, recognise
    for name in ("checkpoint.safetensors", "ours.onnx", "a.engine", "net.pth", "net.bin", "snapshot.safetensors"):
        assert not is_no_model(Path(name)), name
    assert is_no_model(Path("timing.cache"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int64])
def test_arrays_are_known_by_their_header(folder: Path, dtype: type) -> None:
    frames = np.ones((3, 2, 4, 5), dtype)
    np.save("theirs.npy", frames)
    sink = ArraySink(Path("ours.npy"))
    for frame in frames:
        sink.write(frame)
    sink.close()
    assert np.array_equal(np.load("ours.npy"), frames)
    assert np.load("ours.npy").dtype == dtype
    assert [name for name in ("ours.npy", "theirs.npy") if is_marked(Path(name))] == ["ours.npy"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_videos_are_known_by_their_comment(folder: Path, suffix: str) -> None:
    sink, rng = VideoSink(Path(f"ours{suffix}"), Fraction(25)), np.random.default_rng(0)
    for _ in range(40):
        sink.write(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
    sink.close()
    with av.open(f"theirs{suffix}", "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    assert Path(f"ours{suffix}").stat().st_size > 1 << 18  # the comment is not merely somewhere in a small file
    assert is_marked(Path(f"ours{suffix}"))
    assert not is_marked(Path(f"theirs{suffix}"))


def test_pages_and_plots_are_known_by_their_comment(folder: Path) -> None:
    Path("ours.svg").write_text(line_plot("a title", [], x_label="x", y_label="y"))
    Path("theirs.svg").write_text("<svg></svg>")
    assert is_marked(Path("ours.svg"))
    assert not is_marked(Path("theirs.svg"))


def test_a_timing_cache_has_no_mark(folder: Path, accumulator: Model) -> None:
    name = "timing.cache"
    for plain in (b"TRT", b"an older recording"):
        Path(name).write_bytes(plain + bytes(50))
        assert is_no_model(Path(name))
    models = [b"PK\3\4", b"\x80\2", save({"h": np.zeros(2, np.float32)}), accumulator().read_bytes()]
    models += [b"\x08\x08\x12\x07pytorch", msgspec.json.encode(sidecar())]
    for model in models:
        Path(name).write_bytes(model)
        assert not is_no_model(Path(name)), model[:20]
    Path(name).write_bytes(b"plan")
    Path(f"{name}.json").write_bytes(msgspec.json.encode(sidecar()))
    assert not is_no_model(Path(name))


def test_a_reference_is_told_from_other_archives(folder: Path) -> None:
    np.savez("data.npz", x=np.zeros(2))
    np.savez("reference.npz", **{REFERENCE_KEY: np.zeros(2)})
    assert not is_reference(Path("data.npz"))
    assert is_reference(Path("reference.npz"))


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("verify model.onnx --record none/f.npz", "--record none/f.npz"),
        ("verify model.onnx --report none/f.html", "--report none/f.html"),
        ("verify model.onnx --plot none/f.svg", "--plot none/f.svg"),
        ("bench model.onnx --plot none/f.svg", "--plot none/f.svg"),
        ("bench model.onnx --exportTimes none/f.json", "--exportTimes none/f.json"),
        ("compare a.npy b.npy --plot none/f.svg", "--plot none/f.svg"),
        ("events recording.raw -o none/f.png", "--output none/f.png"),
    ],
)
def test_a_missing_folder_is_told_before_the_work(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the files can be read, so that any work would end in another error."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.onnx", "a.npy", "b.npy", "recording.raw"):
        (tmp_path / name).write_bytes(b"?")
    result = call(*command.split())
    assert (result.exit_code, f"{option}: its folder does not exist" in result.stderr) == (1, True), result.stderr
