"""The ONNX Runtime back end: its buffers, its devices, and the float32 form of float16 models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import DeviceError
from stepcell.runtime import StepLoop
from stepcell.runtime.backend import Device
from stepcell.runtime.float32 import to_float32
from stepcell.runtime.ort import OrtBackend

Model = Callable[..., Path]


def test_two_buffers_take_turns(accumulator: Model) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"))
    backend.configure({"batch": 1, "height": 2, "width": 2})
    pair = backend._states["h"]
    assert not np.shares_memory(pair[0].host, pair[1].host)
    x = np.ones((1, 3, 2, 2), np.float32)
    for step in range(1, 6):
        backend.step({"x": x})
        assert pair[step % 2].host.max() == step, "the new state"
        assert pair[1 - step % 2].host.max() == step - 1, "the state the step read is untouched"
    backend.close()
    backend.close()


def test_absent_device_is_refused_or_replaced_as_allowed(accumulator: Model, capfd: pytest.CaptureFixture[str]) -> None:
    path = accumulator()
    with pytest.raises(DeviceError, match="cuda:99") as caught:
        StepLoop.open(path, "cuda:99")
    assert caught.value.exit_code == 6
    with StepLoop.open(path, "cuda:99", allow_fallback=True) as loop:
        assert loop.device == "cpu"
    said = " ".join(capfd.readouterr().err.split())
    assert "running on the CPU instead" in said
    assert "[E:onnxruntime" not in said, "CUDA must not be asked for where it cannot work"


def test_threads_are_honoured(accumulator: Model) -> None:
    backend = OrtBackend(accumulator(), Device("cpu"), threads=1)
    assert backend._session.get_session_options().intra_op_num_threads == 1


def test_float16_model_runs_in_float32_and_says_so_once(
    denoiser_onnx: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StepLoop.open(denoiser_onnx) as loop:
        assert loop.contract.precision == "float32"
        assert {spec.dtype for spec in loop.contract.graph_inputs.values()} == {"float32"}
        assert "float32" in loop.description
        for _ in range(3):
            assert loop.step(x=np.ones((1, 3, 8, 8), np.float32))["y"].dtype == np.float32
    assert capsys.readouterr().err.count("float16 is slow on a CPU") == 1


def test_float32_form_differs_by_rounding_only(denoiser_onnx: Path, clip_path: Path) -> None:
    """Over 100 steps fed back; the tolerance is a few float16 roundings of values near 1 (2**-11)."""
    generator = np.random.default_rng(0)
    with StepLoop.open(denoiser_onnx) as wide, StepLoop.open(denoiser_onnx, keep_float16=True) as narrow:
        assert narrow.contract.precision == "float16"
        worst = 0.0
        for _ in range(100):
            x = generator.random((1, 3, 24, 32)).astype(np.float16)
            expected = wide.step(x=x)["y"]
            found = narrow.step(x=x)["y"]
            assert found.dtype == np.float16
            worst = max(worst, float(np.abs(found - expected).max()))
        state = np.abs(narrow.state()["h"] - wide.state()["h"]).max()
    assert 0 < worst < 8 * 2**-11
    assert state < 8 * 2**-11


def test_float32_form_reaches_every_corner() -> None:
    """Initialisers, constants, casts, types, subgraphs and functions."""
    half = numpy_helper.from_array(np.float16([1.5]), "half")
    branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["inner"], value=numpy_helper.from_array(np.float16([2.0]))),
            helper.make_node("Cast", ["inner"], ["chosen"], to=TensorProto.FLOAT16),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT16, [1])],
    )
    function = helper.make_function(
        "test", "Scale", ["a"], ["b"],
        [
            helper.make_node("Constant", [], ["factor"], value=numpy_helper.from_array(np.float16([3.0]))),
            helper.make_node("Mul", ["a", "factor"], ["b"]),
        ],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
            helper.make_node("If", ["flag"], ["picked"], then_branch=branch, else_branch=branch),
            helper.make_node("Add", ["narrow", "half"], ["sum"]),
            helper.make_node("Mul", ["sum", "picked"], ["product"]),
            helper.make_node("Scale", ["product"], ["y"], domain="test"),
        ],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])],
        [half],
        value_info=[helper.make_tensor_value_info("narrow", TensorProto.FLOAT16, [1])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("test", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()

    wide = to_float32(model)

    onnx.checker.check_model(wide, full_check=True)
    assert "float16" not in onnx.printer.to_text(wide)
    assert model.SerializeToString() == before
    session = onnxruntime.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.float64([0.25]), "flag": np.ones((), bool)})
    np.testing.assert_array_equal(y, np.float32([(0.25 + 1.5) * 2 * 3]))


def test_float32_form_keeps_weights_and_contract(denoiser_onnx: Path) -> None:
    model = onnx.load(denoiser_onnx)
    wide = to_float32(model)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(weights[tensor.name], numpy_helper.to_array(tensor))
    narrow_contract, contract = (
        StepContract.from_json(next(p.value for p in m.metadata_props if p.key == METADATA_KEY)) for m in (model, wide)
    )
    assert narrow_contract.precision == "float16"
    assert contract.precision == "float32"
    assert [spec.name for spec in contract.outputs] == [spec.name for spec in narrow_contract.outputs]
    assert contract.inputs[0].range == narrow_contract.inputs[0].range
