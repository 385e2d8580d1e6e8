"""What TensorRT's parser misreads in silence: it is rewritten or refused, and the parsed network is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import BuildError, InputError
from stepcell.model_size import inlined_nodes
from stepcell.onnx_model import OnnxFile
from stepcell.onnx_rewrite import inline_foreign, sort_nodes, use_time_first
from stepcell.plugins.prepare import unchanged
from stepcell.runtime.engine import parser_model
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.layer_check import check_layers
from stepcell.runtime.engine.parser_model import for_parser
from stepcell.runtime.engine.tensorrt_module import load_tensorrt, no_collection

OPSET = [helper.make_opsetid("", 20)]
FLOAT = TensorProto.FLOAT


def step_file(
    folder: Path,
    nodes: Sequence[NodeProto],
    shape: Sequence[int | str] = ("batch", 4),
    functions: Sequence[onnx.FunctionProto] = (),
    initializer: Sequence[TensorProto] = (),
    dtype: Any = "float32",
    state_shape: Sequence[int | str] | None = None,
) -> Path:
    """A file with input x, output y and the state h, made of `nodes`."""
    state = tuple(state_shape or shape)
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=tuple(shape), dtype=dtype),),
        outputs=(TensorSpec(name="y", shape=state, dtype=dtype),),
        states=(StateSpec(name="h", shape=state, dtype=dtype, batch_axis=state.index(shape[0])),),
        example={dim: 1 for dim in shape if isinstance(dim, str)},
    )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, kind, s.shape) for n, s in contract.graph_inputs.items()],
        [helper.make_tensor_value_info(n, kind, s.shape) for n, s in contract.graph_outputs.items()], initializer,
    )  # fmt: skip
    domains = [helper.make_opsetid(domain, 1) for domain in sorted({f.domain for f in functions})]
    model = helper.make_model(graph, functions=functions, opset_imports=OPSET + domains, ir_version=10)
    model.metadata_props.add(key="stepcell.contract", value=contract.to_json())
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def pair(op: str, *inputs: str, domain: str = "", name: str = "node", **attributes: Any) -> list[NodeProto]:
    """One node that makes y, and h' = y."""
    return [
        helper.make_node(op, inputs, ["y"], name, domain=domain, **attributes),
        helper.make_node("Identity", ["y"], ["state_out.h"], "same"),
    ]


def mean() -> onnx.FunctionProto:
    """my::Mul(a, b) = (a + b) / 2, called like a standard operator."""
    body = [
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["c"]),
    ]
    return helper.make_function("my", "Mul", ["a", "b"], ["c"], body, OPSET)


def opened(path: Path) -> OnnxFile:
    from stepcell.onnx_model import read_onnx

    return read_onnx(path)


@no_collection()
def compare(file: OnnxFile) -> None:
    """Parse a file and compare the network with its graph."""
    trt = load_tensorrt("tensorrt-rtx").module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(file.data), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    check_layers(trt, network, unchanged(file))


def test_function_called_like_an_operator_is_inlined(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    path = step_file(tmp_path, pair("Mul", "x", "state_in.h", domain="my"), functions=[mean()])
    file = for_parser(opened(path))
    assert [node.op_type for node in file.model.graph.node] == ["Constant", "Add", "Mul", "Identity"]
    assert "which TensorRT would look up by bare name: my::Mul" in logged.text
    compare(file)
    build_engine(path, tmp_path / "model.engine")


def test_comparison_finds_a_function_read_as_an_operator(tmp_path: Path) -> None:
    """What a build without inlining makes of it: a product."""
    path = step_file(tmp_path, pair("Mul", "x", "state_in.h", domain="my"), functions=[mean()])
    file = opened(path)
    flat = replace(file, model=inline_foreign(file.model))
    with pytest.raises(BuildError, match=r"operator Add: TensorRT's parser read it as something else: expected 1 ELE"):
        compare(replace(flat, data=file.data))


def test_functions_of_one_name_in_two_domains_are_told_apart(tmp_path: Path) -> None:
    blends = [
        helper.make_function(domain, "Blend", ["a", "b"], ["c"], [helper.make_node(op, ["a", "b"], ["c"])], OPSET)
        for domain, op in (("one", "Add"), ("two", "Sub"))
    ]
    nodes = [
        helper.make_node("Blend", ["x", "state_in.h"], ["y"], "first", domain="one"),
        helper.make_node("Blend", ["x", "state_in.h"], ["state_out.h"], "second", domain="two"),
    ]
    path = step_file(tmp_path, nodes, functions=blends)
    assert [node.op_type for node in for_parser(opened(path)).model.graph.node] == ["Add", "Sub"]
    build_engine(path, tmp_path / "model.engine")


def test_functions_of_the_ops_stay(denoiser_onnx: Path) -> None:
    file = opened(denoiser_onnx)
    assert for_parser(file) is file


def recurrent(op: str, batch: int | str, *, bidirectional: bool = False) -> tuple[list[NodeProto], list[TensorProto]]:
    random, gates = np.random.default_rng(0), {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    ways = 2 if bidirectional else 1
    weights = {"W": (ways, gates * 4, 3), "R": (ways, gates * 4, 4), "b": (ways, gates * 8)}
    tensors = [numpy_helper.from_array(random.normal(size=s).astype(np.float32) / 2, n) for n, s in weights.items()]
    node = helper.make_node(
        op, ["x", "W", "R", "b", "", "state_in.h"], ["all", "state_out.h"], "layer", hidden_size=4, layout=1,
        direction="bidirectional" if bidirectional else "forward",
    )  # fmt: skip
    last = helper.make_node("ReduceSum", ["all", "axis"], ["y"], "last", keepdims=0)
    return [node, last], [*tensors, numpy_helper.from_array(np.array([1]), "axis")]


@pytest.mark.parametrize("op", ["GRU", "LSTM", "RNN"])
def test_layout_1_becomes_layout_0(op: str, tmp_path: Path) -> None:
    """Equal to ONNX's reference, which knows layout=1; ONNX Runtime refuses it before and runs it after."""
    nodes, weights = recurrent(op, 2)
    path = step_file(tmp_path, nodes, (2, 1, 3), initializer=weights, state_shape=(2, 1, 4))
    before = opened(path).model
    x, h = np.random.default_rng(1).normal(size=(2, 2, 1, 4)).astype(np.float32)
    x = x[..., :3]
    expected = ReferenceEvaluator(before).run(None, {"x": x, "state_in.h": h})
    after = for_parser(opened(path)).model
    assert not any(a.name == "layout" for n in after.graph.node for a in n.attribute)
    session = onnxruntime.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"])
    for one, other in zip(session.run(None, {"x": x, "state_in.h": h}), expected, strict=True):
        np.testing.assert_allclose(one, np.reshape(other, one.shape), atol=2e-6)
    compare(for_parser(opened(path)))
    build_engine(path, tmp_path / "model.engine")


def test_comparison_finds_an_ignored_layout(tmp_path: Path) -> None:
    nodes, weights = recurrent("GRU", 2)
    path = step_file(tmp_path, nodes, (2, 1, 3), initializer=weights, state_shape=(2, 1, 4))
    with pytest.raises(BuildError, match=r"node 'layer', operator GRU.*all has shape \[2, 1, 1, 4\] in the graph"):
        compare(opened(path))


def test_layout_inside_a_branch_is_found() -> None:
    nodes, _ = recurrent("GRU", 2)
    inner = helper.make_graph(nodes[:1], "inner", [], [])
    graph = helper.make_graph([helper.make_node("If", ["c"], ["z"], then_branch=inner)], "g", [], [])
    model = helper.make_model(graph)
    assert use_time_first(model) == ["layer"]
    branch = model.graph.node[0].attribute[0].g
    assert [node.op_type for node in branch.node] == ["Transpose", "Transpose", "GRU", "Transpose", "Transpose"]


def in_double() -> list[NodeProto]:
    return [
        helper.make_node("Cast", ["x"], ["wide"], "widen", to=TensorProto.DOUBLE),
        helper.make_node("Add", ["wide", "large"], ["sum"], "shift"),
        helper.make_node("Sub", ["sum", "large"], ["back"], "unshift"),
        helper.make_node("Cast", ["back"], ["narrow"], "narrow", to=FLOAT),
        *pair("Add", "narrow", "state_in.h"),
    ]


LARGE = numpy_helper.from_array(np.array(1e9), "large")


def test_float64_is_refused_by_node(tmp_path: Path) -> None:
    path = step_file(tmp_path, in_double(), initializer=[LARGE])
    with pytest.raises(BuildError, match="node 'shift', operator Add: computes 'wide' in float64") as refused:
        build_engine(path, tmp_path / "model.engine")
    assert "convert" in str(refused.value.hint)
    with pytest.raises(BuildError, match="is float64; TensorRT has no float64"):
        build_engine(step_file(tmp_path, pair("Add", "x", "state_in.h"), dtype="float64"), tmp_path / "model.engine")


def test_float64_inside_a_branch_is_refused(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Cast", ["x"], [f"{name}_wide"], to=TensorProto.DOUBLE),
            helper.make_node(op, [f"{name}_wide"], [f"{name}_root"], f"{name}_inner"),
            helper.make_node("Cast", [f"{name}_root"], [name], to=FLOAT),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, FLOAT, None)])

    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.ones((), bool))),
        helper.make_node("If", ["yes"], ["z"], "if", then_branch=branch("a", "Sqrt"), else_branch=branch("b", "Exp")),
        *pair("Add", "z", "state_in.h"),
    ]
    with pytest.raises(BuildError, match=r"node '[ab]_inner', operator .*in float64"):
        build_engine(step_file(tmp_path, nodes), tmp_path / "model.engine")


def test_comparison_finds_a_narrowed_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = step_file(tmp_path, in_double(), initializer=[LARGE])
    with pytest.raises(BuildError, match="wide is float64 in the graph, float32 in the network"):
        compare(opened(path))
    monkeypatch.setattr(parser_model, "_refuse_float64", lambda *_: None)  # the comparison is a guard of its own
    with pytest.raises(BuildError, match="node 'widen'"):
        build_engine(path, tmp_path / "model.engine")


def test_double_constants_that_are_only_converted_are_built(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["large"], ["k"], "narrow", to=FLOAT),
        helper.make_node("Add", ["x", "k"], ["shifted"], "shift"),
        *pair("Add", "shifted", "state_in.h"),
    ]
    build_engine(step_file(tmp_path, nodes, initializer=[LARGE]), tmp_path / "model.engine")


def test_unsorted_nodes_are_sorted(denoiser_onnx: Path, tmp_path: Path) -> None:
    """A converter leaves its casts at the end; ONNX Runtime runs such a file, ONNX's checker refuses it."""
    model = onnx.load(denoiser_onnx)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes[1:] + nodes[:1])
    path = tmp_path / "unsorted.onnx"
    onnx.save(model, path)
    build_engine(path, tmp_path / "model.engine", check_file=False)
    assert sort_nodes(model)
    assert [node.name for node in model.graph.node] == [node.name for node in nodes]
    assert not sort_nodes(model)


def nested(depth: int, calls: int) -> ModelProto:
    """Functions of which each calls the next several times."""
    functions = []
    for level in range(depth):
        body = [
            helper.make_node(f"F{level + 1}" if level < depth - 1 else "Neg", [f"v{i}"], [f"v{i + 1}"],
                             domain="f" if level < depth - 1 else "")
            for i in range(calls)
        ]  # fmt: skip
        opsets = [*OPSET, helper.make_opsetid("f", 1)]
        functions.append(helper.make_function("f", f"F{level}", ["v0"], [f"v{calls}"], body, opsets))
    info = [helper.make_tensor_value_info(n, FLOAT, [1]) for n in ("a", "b")]
    graph = helper.make_graph([helper.make_node("F0", ["a"], ["b"], domain="f")], "g", info[:1], info[1:])
    return helper.make_model(graph, functions=functions, opset_imports=[*OPSET, helper.make_opsetid("f", 1)])


def test_functions_that_grow_are_counted_and_refused() -> None:
    assert inlined_nodes(nested(3, 2), "m") == len(inline_foreign(nested(3, 2)).graph.node) == 8
    assert inlined_nodes(nested(12, 10), "m") == 10**12
    with pytest.raises(InputError, match=r"the graph: .*1,000,000,000,000 nodes, at most 100,000"):
        inline_foreign(nested(12, 10))


MAP = ("batch", 4, 8, 8)
KERNEL: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "MaxPool": KERNEL,
    "AveragePool": KERNEL,
    "Transpose": {"perm": [0, 1, 3, 2]},
    "Einsum": {"equation": "bchw->bcwh"},
}
TWO_INPUTS = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sum")
ONE_INPUT = (
    *("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Selu", "Softplus", "Softsign", "HardSigmoid", "HardSwish"),
    *("ThresholdedRelu", "Celu", "Gelu", "Mish", "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Sin", "Cos", "Tan"),
    *("Sinh", "Cosh", "Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Erf", "Floor", "Ceil", "Round", "Sign"),
    *("Identity", "Dropout", "GlobalAveragePool", "ReduceMean", "Softmax", "LogSoftmax", "LpNormalization", "Clip"),
    *ATTRIBUTES,
)


def test_comparison_knows_what_operators_become(tmp_path: Path) -> None:
    nodes = [helper.make_node(op, ["x", "state_in.h"], [op], f"of two/{op}") for op in TWO_INPUTS]
    nodes += [helper.make_node(op, ["x"], [op], f"of one/{op}", **ATTRIBUTES.get(op, {})) for op in ONE_INPUT]
    nodes += pair("Sum", *TWO_INPUTS, *ONE_INPUT)
    compare(for_parser(opened(step_file(tmp_path, nodes, MAP))))


def weighted(op: str, shape: Sequence[int], *, bias: bool = True, **attributes: Any) -> Callable[[Path], Path]:
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), "w")]
    weights += [numpy_helper.from_array(np.ones(shape[-1], np.float32), "b")] if bias else []
    nodes = [
        helper.make_node(op, ["x", "w", *(["b"] if bias else [])], ["z"], "node", **attributes),
        helper.make_node("Add", ["z", "state_in.h"], ["y"], "sum"),
        helper.make_node("Identity", ["y"], ["state_out.h"], "same"),
    ]
    size = ("batch", 4) if op in ("Gemm", "MatMul") else MAP
    return lambda folder: step_file(folder, nodes, size, initializer=weights)


@pytest.mark.parametrize(
    "make",
    [
        weighted("Conv", (4, 4, 3, 3), bias=False, pads=[1, 1, 1, 1]),
        weighted("ConvTranspose", (4, 4, 3, 3), bias=False, pads=[1, 1, 1, 1]),
        weighted("MatMul", (4, 4), bias=False),
        weighted("Gemm", (4, 4), alpha=0.5, transB=1),
        weighted("PRelu", (4, 1, 1), bias=False),
    ],
    ids=["Conv", "ConvTranspose", "MatMul", "Gemm", "PRelu"],
)
def test_comparison_knows_operators_with_weights(make: Callable[[Path], Path], tmp_path: Path) -> None:
    compare(for_parser(opened(make(tmp_path))))
