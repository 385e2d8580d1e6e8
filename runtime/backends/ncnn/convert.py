"""Conversion of an ONNX graph of fixed sizes to an ncnn network.

A converter of our own: pnnx, ncnn's, has a wheel that needs torch, which a device has not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from stepcell.runtime.backends.ncnn.graph import Graph, Network, NotConvertible
from stepcell.runtime.backends.ncnn.operators import ANY_TYPE, WRITERS, Node

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import ModelProto, NodeProto

__all__ = ["convert"]

_NARROW = ("UINT8", "INT8", "BOOL")  # integers that may pass through a network, which holds float32 alone


def convert(model: ModelProto) -> Network:
    """Convert a model.

    Args:
        model: of one stream: its inputs, states and outputs have 1 as their first size. Without functions, with fixed
            sizes, folded constants and weights as initializers.

    Raises:
        NotConvertible: ncnn cannot compute it.
    """
    from onnx import numpy_helper

    graph = model.graph
    shapes, types = _tensors(model)
    constants: dict[str, NDArray[Any]] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    network = Graph(shapes, constants)
    inputs = {port.name: network.input(port.name) for port in graph.input if port.name not in constants}
    for name in inputs:
        _check_type(f"input {name}", types.get(name, ""), narrow=True)
    for each in graph.node:
        if each.output[0] not in constants:
            _write(each, network, types)
    return network.finish(inputs, [port.name for port in graph.output])


def _write(proto: NodeProto, network: Graph, types: Mapping[str, str]) -> None:
    from onnx import helper

    if proto.domain not in ("", "ai.onnx") or proto.op_type not in WRITERS:
        raise NotConvertible(f"operator {proto.op_type}")
    attributes = {each.name: helper.get_attribute_value(each) for each in proto.attribute}
    node = Node(proto.op_type, list(proto.input), [name for name in proto.output if name], attributes)
    for name in (*node.inputs[:1], *node.outputs):
        _check_type(str(node), types.get(name, ""), narrow=node.op in ANY_TYPE)
    WRITERS[node.op](node, network)


def _check_type(subject: str, found: str, *, narrow: bool) -> None:
    if found != "FLOAT" and not (narrow and found in _NARROW):
        raise NotConvertible(f"{subject}: of type {found.lower() or 'unknown'}")


def _tensors(model: ModelProto) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of every tensor whose shape is known (0 is an unknown size), and its type."""
    from onnx import TensorProto, shape_inference

    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {}
    types = {tensor.name: TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
        types[value.name] = TensorProto.DataType.Name(tensor.elem_type)
    return shapes, types
