"""Small convolutions in the plain layout: which ones, where they are computed, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from stepcell import StepLoop
from stepcell.contract import METADATA_KEY, StateSpec, StepContract, TensorSpec
from stepcell.runtime.backends.onnxruntime.plain_convolutions import keep_plain

Array = NDArray[Any]
STEPS = 64


def convolution(channels: tuple[int, int], kernel: int, *, group: int = 1) -> onnx.ModelProto:
    """y = Conv(x) of (in, out) channels."""
    inside, outside = channels
    weight = np.random.default_rng(0).standard_normal((outside, inside // group, kernel, kernel), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[kernel // 2] * 4, group=group)
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, size, 20, 30))
        for name, size in zip("xy", channels, strict=True)
    ]
    graph = helper.make_graph([node], "one", tensors[:1], tensors[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def blocked(model: onnx.ModelProto, path: Path) -> bool:
    """Whether ONNX Runtime brings its convolution into blocks."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return any(node.domain == "com.microsoft.nchwc" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("channels", "kernel", "group", "plain"),
    [
        ((3, 3), 1, 1, True),
        ((8, 12), 1, 1, True),
        ((8, 4), 3, 1, True),
        ((3, 8), 3, 1, False),
        ((3, 3), 5, 1, False),
        ((3, 16), 1, 1, False),
        ((16, 3), 1, 1, False),
        ((4, 4), 1, 4, False),
    ],
)
def test_small_convolutions_stay_plain(
    channels: tuple[int, int], kernel: int, group: int, plain: bool, tmp_path: Path
) -> None:
    model = convolution(channels, kernel, group=group)
    was_blocked = blocked(model, tmp_path / "before.onnx")
    assert keep_plain(model) == plain
    onnx.checker.check_model(model, full_check=True)
    if plain:
        if not was_blocked:
            pytest.skip("ONNX Runtime has no blocked layout for this processor")
        assert not blocked(model, tmp_path / "after.onnx")


def test_a_weight_that_others_read_too_is_left_to_them() -> None:
    model = convolution((3, 3), 1)
    model.graph.node.append(helper.make_node("Shape", ["w"], ["sizes"]))
    model.graph.output.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, (4,)))
    assert keep_plain(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "stepcell.plain.0"]


def stepping_model(path: Path) -> Array:
    """h = tanh(Conv(x) + Conv(h)), both 1x1 with 3 channels; returns the weights, of x and of h."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(-0.5, 0.5, (2, 3, 3, 1, 1)).astype(np.float32)
    shape = ("batch", 3, "height", "width")
    x, y = (TensorSpec(name=name, dtype="float32", shape=shape, layout="NCHW") for name in "xy")
    state = StateSpec(name="h", input="state_in.h", output="state_out.h", dtype="float32", shape=shape, batch_axis=0)
    contract = StepContract(inputs=(x,), outputs=(y,), states=(state,), precision="float32")
    nodes = [
        helper.make_node("Conv", ["x", "w_x"], ["a"]),
        helper.make_node("Conv", ["state_in.h", "w_h"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Tanh", ["c"], ["state_out.h"]),
        helper.make_node("Identity", ["state_out.h"], ["y"]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("x", "state_in.h", "y", "state_out.h")
    ]
    constants = [numpy_helper.from_array(each, name) for each, name in zip(weights, ("w_x", "w_h"), strict=True)]
    graph = helper.make_graph(nodes, "step", tensors[:2], tensors[2:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract.to_json()
    onnx.save(model, path)
    return weights


def test_a_loop_computes_the_same_over_many_steps_in_a_batch_too(tmp_path: Path) -> None:
    of_x, of_h = stepping_model(tmp_path / "step.onnx").astype(np.float64)[..., 0, 0]
    frames = np.random.default_rng(1).standard_normal((STEPS, 3, 3, 21, 33), np.float32)
    h = np.zeros(frames.shape[1:])
    worst = 0.0
    with StepLoop.open(tmp_path / "step.onnx", threads=1, backend="onnxruntime") as loop:
        found = [loop.step(x=x)["y"] for x in frames]
        weights = [each.name for each in loop._backend._session.get_overridable_initializers()]
    assert weights == ["stepcell.plain.0", "stepcell.plain.1"], "the loop runs the changed graph"
    for x, y in zip(frames, found, strict=True):
        h = np.tanh(np.einsum("oi,nihw->nohw", of_x, x) + np.einsum("oi,nihw->nohw", of_h, h))
        worst = max(worst, float(np.abs(y - h).max()))
    print(f"worst difference to float64 over {STEPS} steps: {worst:.1e}")
    assert worst < 1e-6
    with StepLoop.open(tmp_path / "step.onnx", threads=1, backend="onnxruntime") as loop:
        for x, y in zip(frames, found, strict=True):
            np.testing.assert_array_equal(loop.step(x=x[1:2])["y"], y[1:2])
