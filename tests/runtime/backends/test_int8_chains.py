"""int8 chains: the same results as the QuantizeLinear and DequantizeLinear that they come from, and nothing between."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from stepcell.runtime.backends.onnxruntime.drop_copies import drop_copies
from stepcell.runtime.backends.onnxruntime.int8_chains import chain_int8

Array = NDArray[Any]
FLOAT = onnx.TensorProto.FLOAT


class Graph:
    """A graph in the making: nodes, constants, and the QuantizeLinear and DequantizeLinear of a tensor."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.rng = np.random.default_rng(0)

    def op(self, kind: str, inputs: list[str], *outputs: str, **options: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, **options))

    def rounded(self, name: str, scale: float) -> str:
        self.constants[f"{name}_s"], self.constants[f"{name}_z"] = np.float32(scale), np.int8(0)
        ends = [f"{name}_s", f"{name}_z"]
        self.op("QuantizeLinear", [name, *ends], f"{name}_q")
        self.op("DequantizeLinear", [f"{name}_q", *ends], f"{name}_f")
        return f"{name}_f"

    def conv(self, source: str, name: str, shape: tuple[int, ...], scale: float, **options: Any) -> str:
        """An int8 convolution of floats that have been rounded; its output rounded."""
        levels = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.constants |= {
            f"{name}_w": levels,
            f"{name}_ws": self.rng.uniform(0.5, 1, shape[0]).astype(np.float32)
            / np.float32(20 * levels[0].size ** 0.5),
            f"{name}_wz": np.zeros(shape[0], np.int8),
            f"{name}_b": self.rng.standard_normal(shape[0]).astype(np.float32),
        }
        self.op("DequantizeLinear", [f"{name}_w", f"{name}_ws", f"{name}_wz"], f"{name}_wf", axis=0)
        self.op("Conv", [source, f"{name}_wf", f"{name}_b"], name, **options)
        return self.rounded(name, scale)

    def model(self, inputs: dict[str, tuple[int, ...]], outputs: tuple[str, ...]) -> onnx.ModelProto:
        ports = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()]
        ends = [helper.make_tensor_value_info(name, FLOAT, [None] * 4) for name in outputs]
        tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "graph", ports, ends, tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made


def everything() -> onnx.ModelProto:
    """What a chain goes through, and what ends it: a pooling, outputs of the model."""
    graph = Graph()
    x = graph.rounded("x", 0.01)
    first = graph.conv(x, "first", (8, 3, 5, 5), 0.02, strides=[2, 2], pads=[2, 2, 2, 2])
    graph.op("Relu", [first], "relu")
    second = graph.conv(graph.rounded("relu", 0.02), "second", (8, 4, 3, 3), 0.03, pads=[1, 1, 1, 1], group=2)
    graph.op("Relu", [second], "features")
    graph.op("Concat", ["features", "h"], "both", axis=1)
    gates = graph.conv(graph.rounded("both", 0.03), "gates", (16, 16, 3, 3), 0.05, pads=[1, 1, 1, 1])
    graph.constants["factor"] = np.linspace(0.1, 2, 16, dtype=np.float32).reshape(16, 1, 1)
    graph.op("Mul", [gates, "factor"], "scaled")
    graph.op("Split", ["scaled"], "z", "r", axis=1, num_outputs=2)
    graph.op("Sigmoid", ["r"], "reset")
    graph.op("Mul", ["reset", "h"], "rh")
    graph.op("Concat", ["features", "rh"], "both_again", axis=1)
    graph.conv(graph.rounded("both_again", 0.03), "blend", (6, 16, 1, 1), 0.04)
    graph.op("MaxPool", ["features"], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    last = graph.conv(graph.rounded("pooled", 0.03), "last", (5, 8, 3, 3), 0.06)
    graph.op("Relu", [last], "y")
    return graph.model({"x": (2, 3, 16, 20), "h": (2, 8, 8, 10)}, ("y", "z", "features", "blend_f"))


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in model.graph.output]
    return dict(zip(names, session.run(None, feeds), strict=True))


def feeds_of(model: onnx.ModelProto) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shapes = {port.name: [dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in model.graph.input}
    return {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def test_results_stay_the_same() -> None:
    model, feeds = everything(), feeds_of(everything())
    names = [output.name for output in model.graph.output]
    truth = dict(zip(names, ReferenceEvaluator(model).run(None, feeds), strict=True))
    assert chain_int8(model) == 5
    onnx.checker.check_model(model)
    found = run(model, feeds)
    assert list(found) == names
    steps = {"y": 0.06, "z": 0.1, "features": 0.03, "blend_f": 0.04}
    for name, step in steps.items():
        difference = np.abs(found[name] - truth[name])
        assert np.std(truth[name]) > 5 * step, "the test must see something"
        assert (difference > 1e-5).mean() < 0.08, name  # sums next to the middle of two levels, and what reads them
        assert difference.max() < 2.5 * step, name


def test_floats_are_made_only_where_something_needs_them() -> None:
    model = everything()
    chain_int8(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QLinearConv"] == 5
    assert kinds["Conv"] == kinds["Relu"] == 0
    assert kinds["QuantizeLinear"] == 4  # x, h, rh, pooled
    assert kinds["DequantizeLinear"] == 5  # the outputs z, features, blend_f, y, and r
    assert kinds["Mul"] == 1  # of the gate
    assert kinds["Reshape"] == 2


@pytest.mark.parametrize("size", [(12, 16), (13, 16)])
@pytest.mark.parametrize(("kernel", "pads"), [(5, [2, 2, 2, 2]), (3, [1, 1, 1, 1]), (3, [0, 1, 1, 0]), (2, [0] * 4)])
def test_strides_of_two(size: tuple[int, int], kernel: int, pads: list[int]) -> None:
    graph = Graph()
    graph.conv(graph.rounded("x", 0.01), "y", (4, 3, kernel, kernel), 0.02, strides=[2, 2], pads=pads)
    model = graph.model({"x": (1, 3, *size)}, ("y_f",))
    feeds = feeds_of(model)
    (truth,) = ReferenceEvaluator(model).run(None, feeds)
    assert chain_int8(model) == 1
    found = run(model, feeds)["y_f"]
    assert found.shape == truth.shape
    assert (np.abs(found - truth) > 1e-5).mean() < 0.02
    assert any(node.op_type == "Reshape" for node in model.graph.node) == (size[0] % 2 == 0)


def test_what_is_left_alone() -> None:
    """Weights that are no constant, zero points, int8 that is an output, and bodies of branches."""
    asymmetric, floats, output = Graph(), Graph(), Graph()
    for graph in (asymmetric, floats, output):
        graph.conv(graph.rounded("x", 0.01), "y", (4, 4, 3, 3), 0.02)
    asymmetric.constants["x_z"] = np.int8(3)
    floats.nodes[-2:] = []  # the output of the convolution is not rounded
    output.nodes = output.nodes[:-1]
    for graph, end in ((asymmetric, "y_f"), (floats, "y")):
        model = graph.model({"x": (1, 4, 8, 8)}, (end,))
        before = model.SerializeToString()
        assert chain_int8(model) == 0
        assert model.SerializeToString() == before
    model = output.model({"x": (1, 4, 8, 8)}, ())
    model.graph.output.append(helper.make_tensor_value_info("y_q", onnx.TensorProto.INT8, None))
    assert chain_int8(model) == 0


def test_a_cast_that_changes_nothing_is_dropped() -> None:
    nodes = [
        helper.make_node("Tanh", ["x"], ["t"]),
        helper.make_node("Cast", ["t"], ["state"], to=FLOAT),
        helper.make_node("Cast", ["t"], ["y"], to=FLOAT),
        helper.make_node("Cast", ["x"], ["copy"], to=FLOAT),
        helper.make_node("Cast", ["t"], ["half"], to=onnx.TensorProto.FLOAT16),
    ]
    ports = [helper.make_tensor_value_info(name, FLOAT, [2, 3]) for name in ("x", "state", "y", "copy")]
    ports.append(helper.make_tensor_value_info("half", onnx.TensorProto.FLOAT16, [2, 3]))
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feeds = feeds_of(model)
    before = run(model, feeds)
    assert drop_copies(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Tanh", "Cast", "Cast", "Cast"]
    after = run(model, feeds)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_step_loop_runs_chains(tmp_path: Path) -> None:
    """The session that is made for a size has the chains, with no transposition of floats."""
    pytest.importorskip("torch")
    from stepcell import export_onnx
    from stepcell.exporter.quantize import quantize
    from stepcell.models.zoo.denoiser import Denoiser
    from stepcell.runtime.backends.base import Device
    from stepcell.runtime.backends.onnxruntime.backend import OrtBackend

    export_onnx(Denoiser(hidden=8).eval(), tmp_path / "model.onnx", pixels=None)
    frames = np.random.default_rng(0).random((8, 1, 3, 8, 8), np.float32)
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", [[{"x": frame} for frame in frames]], max_loss=1)
    backend = OrtBackend(tmp_path / "int8.onnx", Device("cpu", 0))
    model = backend.simplified({"batch": 1, "height": 8, "width": 8})
    assert model is not None
    assert drop_copies(model) == 1
    assert chain_int8(model) == 5
    rounded = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == 4, f"x, h, r * h and the new h; features keep their bytes: {rounded}"
    floats = {node.output[0] for node in model.graph.node if node.op_type in ("DequantizeLinear", "Sigmoid", "Tanh")}
    assert not any(node.op_type == "Transpose" and node.input[0] in floats for node in model.graph.node)
