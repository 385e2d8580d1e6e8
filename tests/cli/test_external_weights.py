"""Weights outside a model's folder, or behind a link, are read by no command, whatever library opens the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from stepcell.errors import InputError
from stepcell.external_weights import check_external_weights
from stepcell.onnx_model import read_model
from tests.cli.command import call

WEIGHTS = "apart.bin"


@pytest.fixture
def model(tmp_path: Path, denoiser_onnx: Path) -> Path:
    """An exported model with its weights beside it."""
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(denoiser_onnx), path, save_as_external_data=True, location=WEIGHTS, size_threshold=0)
    return path


def relocated(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def parent(path: Path) -> None:
    (path.parent / WEIGHTS).rename(path.parent.parent / WEIGHTS)
    relocated(path, f"../{WEIGHTS}")


def absolute(path: Path) -> None:
    relocated(path, str(path.parent / WEIGHTS))


def subfolder(path: Path) -> None:
    (path.parent / "x").mkdir()
    (path.parent / WEIGHTS).rename(path.parent / "x" / WEIGHTS)
    relocated(path, f"x/{WEIGHTS}")


def symbolic_link(path: Path) -> None:
    outside = path.parent.parent / "secret.bin"
    (path.parent / WEIGHTS).rename(outside)
    (path.parent / WEIGHTS).symlink_to(outside)


def hard_link(path: Path) -> None:
    os.link(path.parent / WEIGHTS, path.parent.parent / "secret.bin")


def device(path: Path) -> None:
    (path.parent / WEIGHTS).unlink()
    os.mkfifo(path.parent / WEIGHTS)


def missing(path: Path) -> None:
    (path.parent / WEIGHTS).unlink()


def memory_address(path: Path) -> None:
    relocated(path, "*/_ORT_MEM_ADDR_/*")


def null_byte(path: Path) -> None:
    relocated(path, "a\0b")


SPELLINGS = [parent, absolute, subfolder, symbolic_link, hard_link, device, missing, memory_address, null_byte]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_guard_refuses_each_spelling(model: Path, spelling: Callable[[Path], None]) -> None:
    read_model(model)
    spelling(model)
    with pytest.raises(InputError, match=r"weights .* are in"):
        read_model(model)


@pytest.mark.parametrize("where", ["subgraph", "function", "default", "sparse", "twice", "range"])
def test_the_guard_looks_everywhere(tmp_path: Path, where: str) -> None:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../w.bin")
    node = onnx.NodeProto(op_type="Constant")
    model = onnx.ModelProto()
    if where == "subgraph":
        node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.initializer.append(tensor)
    elif where in ("function", "default"):
        function = model.functions.add(name="f", domain="d")
        if where == "default":
            function.attribute_proto.add(name="t", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        else:
            function.node.add(op_type="Constant").attribute.add(name="value").t.CopyFrom(tensor)
    elif where == "sparse":
        node.attribute.add(name="sparse_value").sparse_tensor.values.CopyFrom(tensor)
    else:
        (tmp_path / "w.bin").write_bytes(bytes(4))
        tensor.external_data[0].value = "w.bin"
        if where == "twice":
            tensor.external_data.add(key="location", value="../w.bin")
        else:
            tensor.external_data.add(key="offset", value="-8")
        model.graph.initializer.append(tensor)
    model.graph.node.append(node)
    with pytest.raises(InputError, match="weights 'w'"):
        check_external_weights(model, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "m.onnx", "--input", "none.npy"],
        ["run", "m.onnx", "--input", "none.npy", "--no-check"],
        ["run", "m.onnx", "--input", "none.npy", "--keep-float16"],
        ["run", "m.onnx", "--input", "none.npy", "--device", "cuda"],
        ["build", "m.onnx", "-o", "m.engine"],
        ["fuse", "m.onnx", "-o", "n.onnx"],
        ["verify", "m.onnx"],
        ["bench", "m.onnx", "--steps", "2"],
        ["inspect", "m.onnx"],
    ],
    ids=" ".join,
)
def test_no_command_reads_them(model: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parent(model)
    monkeypatch.chdir(model.parent)
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert "only a plain file in the same folder is opened" in result.output
    assert "Traceback" not in result.output
