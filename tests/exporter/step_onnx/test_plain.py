"""`export --plain`: standard operators alone, equal to the ordinary export, and stepped by other runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from stepcell import StepLoop, export_onnx
from stepcell.onnx_model import read_onnx
from stepcell.runtime.engine.build import build_engine
from tests.exported_models import denoiser, learned
from tools.interop import __main__ as interop

# `make interop` makes it: the runtimes do not share an environment with stepcell.
PYTHON = Path(__file__).parents[3] / "build" / "interop" / "bin" / "python"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ConvGRU below a ConvLSTM with learned first values, float32, fixed sizes."""
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    export_onnx(learned(), path, precision="float32", plain=True, shapes={"x": interop.SHAPE})
    return path


def test_plain_file_has_standard_operators_with_constant_weights(plain: Path) -> None:
    model = onnx.load(plain)
    assert not model.functions
    assert [item.domain for item in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {node.input[1] for node in model.graph.node if node.op_type == "Conv"} <= weights
    operators = {node.op_type for node in model.graph.node}
    assert operators.isdisjoint({"CastLike", "Cast", "Shape", "Slice", "Constant"})
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info]
    assert shapes
    assert all(all(shape) for shape in shapes)
    assert [cell.op for cell in read_onnx(plain).contract.cells] == [None, None]


def test_plain_file_steps_and_builds_like_the_ordinary_one(plain: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary.onnx"
    contract = export_onnx(learned(), ordinary, precision="float32", shapes={"x": interop.SHAPE})
    assert read_onnx(plain).contract.states == contract.states
    frames = np.random.default_rng(0).random((20, *interop.SHAPE), np.float32)
    with StepLoop.open(plain) as one, StepLoop.open(ordinary) as other:
        for frame in frames:
            np.testing.assert_allclose(one.step(x=frame)["y"], other.step(x=frame)["y"], atol=1e-6)
    build_engine(plain, tmp_path / "plain.engine")


def test_dynamic_sizes_are_plain_names_and_float16_casts_have_a_type(tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    export_onnx(denoiser(), path, plain=True)
    model = onnx.load(path)
    dims = [dim.dim_param or dim.dim_value for dim in model.graph.output[1].type.tensor_type.shape.dim]
    assert dims == ["batch", 8, 0, 0]
    assert read_onnx(path).contract.states[0].shape == ("batch", 8, "height // 2", "width // 2")
    assert {node.op_type for node in model.graph.node} >= {"Cast"}
    assert all(node.op_type != "CastLike" for node in model.graph.node)


@pytest.mark.skipif(not PYTHON.is_file(), reason="no build/interop with OpenVINO, tract, ncnn and IREE: make interop")
@pytest.mark.parametrize(("runtime", "limit"), [("openvino", 5e-6), ("tract", 5e-6), ("iree", 5e-6)])
def test_runtime_steps_a_plain_file(runtime: str, limit: float, plain: Path, tmp_path: Path) -> None:
    """20 steps with states fed back, from learned first values."""
    found = interop.stepped(str(PYTHON), runtime, plain, tmp_path)
    assert found["failed"] == ""
    assert found["error"] < limit


@pytest.mark.skipif(not PYTHON.is_file(), reason="no build/interop with pnnx and ncnn: make interop")
def test_ncnn_steps_a_plain_file(tmp_path: Path) -> None:
    """A model without two equal outputs, which pnnx does not survive; it runs in a child process."""
    path = tmp_path / "plain.onnx"
    export_onnx(denoiser(), path, precision="float32", plain=True, shapes={"x": interop.SHAPE})
    found = interop.stepped(str(PYTHON), "ncnn", path, tmp_path)
    assert found["failed"] == ""
    assert found["error"] < 5e-3
