"""Comparison of the layers that TensorRT's parser made with the nodes of the graph: kinds, counts, dtypes, shapes.

A parser that misreads a node builds another network without a message, and often there is no GPU to see its results.
Each layer says from which node it came. For operators that are one layer, kind and count must be right; others must
have a layer; and every tensor that has the name of a value of the graph must have its dtype and its fixed sizes.
Only nodes that depend on an input are compared: the parser folds constants and rewrites arithmetic on shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepcell.errors import BuildError
from stepcell.library_errors import library_errors
from stepcell.ops import DOMAIN
from stepcell.plugins.prepare import PreparedModel
from stepcell.runtime.engine.parser_model import node_label
from stepcell.runtime.engine.tensorrt_module import dtype_name

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["check_layers"]

_PREFIX = "[ONNX Layer: "
_STANDARD = ("", "ai.onnx")
_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # onnx.TensorProto.DataType

# What TensorRT makes of operators that are one layer: its type, and its operation where the type has several.
_ONE_LAYER = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY",
    **{op: f"ELEMENTWISE {kind}" for op, kind in {
        "Add": "SUM", "Sub": "SUB", "Mul": "PROD", "Div": "DIV", "Pow": "POW", "Max": "MAX", "Min": "MIN",
        "Sum": "SUM", "Equal": "EQUAL", "Greater": "GREATER", "Less": "LESS", "And": "AND", "Or": "OR", "Xor": "XOR",
    }.items()},
    **{op: f"ACTIVATION {kind}" for op, kind in {
        "Relu": "RELU", "Sigmoid": "SIGMOID", "Tanh": "TANH", "LeakyRelu": "LEAKY_RELU", "Elu": "ELU", "Selu": "SELU",
        "Softplus": "SOFTPLUS", "Softsign": "SOFTSIGN", "HardSigmoid": "HARD_SIGMOID",
        "ThresholdedRelu": "THRESHOLDED_RELU",
    }.items()},
    **{op: f"UNARY {kind}" for op, kind in {
        "Exp": "EXP", "Log": "LOG", "Sqrt": "SQRT", "Reciprocal": "RECIP", "Abs": "ABS", "Neg": "NEG", "Sin": "SIN",
        "Cos": "COS", "Tan": "TAN", "Sinh": "SINH", "Cosh": "COSH", "Asin": "ASIN", "Acos": "ACOS", "Atan": "ATAN",
        "Asinh": "ASINH", "Acosh": "ACOSH", "Atanh": "ATANH", "Erf": "ERF", "Floor": "FLOOR", "Ceil": "CEIL",
        "Round": "ROUND", "Sign": "SIGN", "Not": "NOT",
    }.items()},
}  # fmt: skip
_VARIADIC = ("Max", "Min", "Sum")  # a layer for each input but one

# Operators of several layers, or of other layers in other versions; of these only a layer of this type must be there.
_HAS_LAYER = {
    **dict.fromkeys(("GRU", "LSTM", "RNN"), ("RECURRENCE",)),
    "Gemm": ("MATRIX_MULTIPLY",),
    "Einsum": ("EINSUM",),
    "GridSample": ("GRID_SAMPLE",),
    "Resize": ("RESIZE",),
    "MaxPool": ("POOLING",),
    "AveragePool": ("POOLING",),
    "Softmax": ("SOFTMAX",),
}
# Layers that move values; any node may have some more of these.
_NEUTRAL = frozenset(
    {
        *("ASSERTION", "CAST", "CONCATENATION", "CONSTANT", "GATHER", "IDENTITY", "SHAPE", "SHUFFLE", "SLICE"),
        *("SQUEEZE", "UNSQUEEZE"),
    }
)
_OPERATION = {
    "ACTIVATION": ("IActivationLayer", "type"),
    "ELEMENTWISE": ("IElementWiseLayer", "op"),
    "UNARY": ("IUnaryLayer", "op"),
}


@dataclass(frozen=True)
class _Expected:
    """A node to compare: its label in TensorRT's metadata, the operator, and how to call it in a message."""

    label: str
    node: NodeProto
    where: str


def check_layers(trt: Any, network: Any, prepared: PreparedModel) -> None:
    """Compare a parsed network with its graph.

    Raises:
        BuildError: they differ; the message names the node.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    groups: dict[str, list[str]] = {}
    tensors: dict[str, Any] = {}
    for layer in layers:
        origin = getattr(layer, "metadata", "")
        if origin.startswith(_PREFIX):
            groups.setdefault(origin[len(_PREFIX) : -1], []).append(_kind(trt, layer))
        for index in range(layer.num_outputs):
            tensors[layer.get_output(index).name] = layer.get_output(index)
    if not groups:
        return  # a version that does not say where layers come from
    values = _values(prepared.model)
    for expected in _expected(prepared.model):
        read = [values[name].elem_type for name in expected.node.input if expected.where == "" and name in values]
        if any(elem_type not in _FLOATS for elem_type in read):
            continue  # arithmetic on sizes and flags, which the parser writes in its own way
        problem = _difference(expected.node, groups.get(expected.label, []))
        problem = problem or (_tensor_difference(expected.node, tensors, values) if expected.where == "" else "")
        if problem:
            raise BuildError(
                f"{prepared.path}: node {expected.where}{node_label(expected.node)!r}, operator "
                f"{expected.node.op_type}: TensorRT's parser read it as something else: {problem}",
                hint="please report it; --verbose shows the parser's messages",
            )


def _kind(trt: Any, layer: Any) -> str:
    kind = str(layer.type.name)
    if kind not in _OPERATION:
        return kind
    name, attribute = _OPERATION[kind]
    layer.__class__ = getattr(trt, name)  # the bindings return the base class
    return f"{kind} {getattr(layer, attribute).name}"


def _difference(node: NodeProto, kinds: list[str]) -> str:
    computing = Counter(kind for kind in kinds if kind not in _NEUTRAL)
    got = ", ".join(f"{count} {kind}" for kind, count in sorted(computing.items())) or "no layer"
    if node.op_type in _ONE_LAYER:
        count = len(node.input) - 1 if node.op_type in _VARIADIC else 1
        wanted = Counter({_ONE_LAYER[node.op_type]: count} if count else {})
        return "" if computing == wanted else f"expected {count} {_ONE_LAYER[node.op_type]}, got {got}"
    wanted_types = _HAS_LAYER.get(node.op_type, ())
    if wanted_types and not any(kind.split()[0] in wanted_types for kind in kinds):
        return f"expected {' or '.join(wanted_types)}, got {got}"
    return ""


def _tensor_difference(node: NodeProto, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """How a tensor of the network differs from the value of the graph whose name it has."""
    for name in node.output:
        tensor, value = tensors.get(name), values.get(name)
        if tensor is None or value is None:
            continue
        dtype, got = _FLOATS.get(value.elem_type), dtype_name(tensor.dtype)
        if dtype is not None and got != dtype:
            return f"{name} is {dtype} in the graph, {got} in the network"
        if not value.HasField("shape"):
            continue
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.shape.dim]
        shape = list(tensor.shape)
        if len(sizes) != len(shape) or any(-1 not in (a, b) and a != b for a, b in zip(sizes, shape, strict=True)):
            return f"{name} has shape {sizes} in the graph, {shape} in the network (-1: dynamic)"
    return ""


def _values(model: ModelProto) -> dict[str, Any]:
    """The type of every value of the graph that shape inference finds."""
    from onnx import shape_inference

    with library_errors("the graph", BuildError, what="its types cannot be inferred"):
        graph = shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}


def _expected(model: ModelProto) -> Iterator[_Expected]:
    """The nodes of standard operators to compare, those of the ops' functions once for each cell."""
    functions = {(f.domain, f.name): f for f in model.functions if f.domain == DOMAIN}
    constant = {tensor.name for tensor in model.graph.initializer}
    live = {value.name for value in model.graph.input} - constant
    for node in _live(model.graph.node, live):
        yield _Expected(node_label(node), node, "")
        function = functions.get((node.domain, node.op_type))
        if function is not None:
            call = node_label(node)
            inside = {formal for formal, actual in zip(function.input, node.input, strict=False) if actual in live}
            for inner in _live(function.node, inside):
                yield _Expected(f"{node_label(inner)} | {call} ({node.op_type})", inner, f"{call!r} > ")


def _live(nodes: Iterable[NodeProto], live: set[str]) -> Iterator[NodeProto]:
    """Nodes whose values depend on an input and not on its shape alone; `live` gets the names of their outputs."""
    for node in nodes:
        inside = {
            name for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)
            for inner in graph.node for name in inner.input
        }  # fmt: skip
        if node.op_type in ("Shape", "Size") or live.isdisjoint({*node.input, *inside}):
            continue
        live.update(filter(None, node.output))
        yield node
