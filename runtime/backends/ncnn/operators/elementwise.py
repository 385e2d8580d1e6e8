"""Functions of one element, and of two with broadcasting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.backends.ncnn.graph import Graph, NotConvertible, Parameter, plain
from stepcell.runtime.backends.ncnn.operators.registry import Node, writes

__all__: list[str] = []

# Layers, with the attributes of the operator that are their parameters: name and default.
_ACTIVATIONS: dict[str, tuple[str, dict[int, tuple[str, float]]]] = {
    "Sigmoid": ("Sigmoid", {}),
    "Tanh": ("TanH", {}),
    "Relu": ("ReLU", {}),
    "LeakyRelu": ("ReLU", {0: ("alpha", 0.01)}),
    "Elu": ("ELU", {0: ("alpha", 1.0)}),
    "Celu": ("CELU", {0: ("alpha", 1.0)}),
    "Selu": ("SELU", {0: ("alpha", 1.6732632), 1: ("gamma", 1.0507010)}),
    "HardSigmoid": ("HardSigmoid", {0: ("alpha", 0.2), 1: ("beta", 0.5)}),
    "HardSwish": ("HardSwish", {0: ("", 1 / 6), 1: ("", 0.5)}),
    "Softplus": ("Softplus", {}),
    "Mish": ("Mish", {}),
    "Erf": ("Erf", {}),
}
_UNARY = {"Abs": 0, "Neg": 1, "Floor": 2, "Ceil": 3, "Sqrt": 5, "Exp": 7, "Log": 8, "Sin": 9, "Cos": 10}
_UNARY |= {"Reciprocal": 15, "Round": 18, "Sign": 20}
_TRUNCATE = 19
_BINARY = {"Add": 0, "Sub": 1, "Mul": 2, "Div": 3, "Max": 4, "Min": 5, "Pow": 6}
_REVERSED = {1: 7, 3: 8, 6: 9}  # the operation with its operands exchanged, where the result differs


@writes(*_ACTIVATIONS)
def activation(node: Node, graph: Graph) -> None:
    kind, parameters = _ACTIVATIONS[node.op]
    given = {key: float(node.get(name, default)) for key, (name, default) in parameters.items()}
    graph.layer(kind, node.inputs, node.outputs, given)


@writes("Gelu")
def gelu(node: Node, graph: Graph) -> None:
    graph.layer("GELU", node.inputs, node.outputs, {0: int(node.get("approximate", "none") == "tanh")})


@writes("PRelu")
def prelu(node: Node, graph: Graph) -> None:
    slopes = node.weights(graph, 1)
    if slopes.size not in (1, graph.shape(node.inputs[0])[0]):
        raise NotConvertible(f"{node}: expected a slope for each channel, got {slopes.shape}")
    graph.layer("PReLU", node.inputs[:1], node.outputs, {0: slopes.size}, [plain(slopes)])


@writes("Clip")
def clip(node: Node, graph: Graph) -> None:
    limits: dict[int, Parameter] = {}
    for key, name in enumerate(("min", "max")):
        given = node.weights(graph, key + 1) if node.input(key + 1) else node.get(name)
        if given is not None and math.isfinite(value := float(np.ravel(given)[0])):
            limits[key] = value
    graph.layer("Clip", node.inputs[:1], node.outputs, limits)


@writes(*_UNARY)
def unary(node: Node, graph: Graph) -> None:
    graph.layer("UnaryOp", node.inputs, node.outputs, {0: _UNARY[node.op]})


@writes("Identity", moves=True)
def identity(node: Node, graph: Graph) -> None:
    graph.alias(node.outputs[0], node.inputs[0])


@writes("Cast", moves=True)
def cast(node: Node, graph: Graph) -> None:
    """All tensors are float32 in ncnn: floats become integers by dropping their fraction, and nothing else changes."""
    from onnx import TensorProto

    if node.get("to") in (TensorProto.FLOAT, TensorProto.FLOAT16):
        graph.alias(node.outputs[0], node.inputs[0])
    elif node.get("to") in (TensorProto.UINT8, TensorProto.INT8):
        graph.layer("UnaryOp", node.inputs, node.outputs, {0: _TRUNCATE})
    else:
        raise NotConvertible(f"{node}: a type that float32 does not hold")


@writes(*_BINARY)
def binary(node: Node, graph: Graph) -> None:
    if len(node.inputs) != 2:
        raise NotConvertible(f"{node}: expected two operands, got {len(node.inputs)}")
    operation, result = _BINARY[node.op], node.outputs[0]
    left, right = node.inputs
    if graph.constant(left) is not None:
        left, right, operation = right, left, _REVERSED.get(operation, operation)
    other = graph.constant(right)
    if other is not None and other.size == 1 and other.ndim <= len(graph.shape(left)) + 1:
        graph.layer("BinaryOp", [left], [result], {0: operation, 1: 1, 2: float(other.reshape(()))})
        return
    rank = len(graph.shape(result))
    operands = [_of_rank(node, graph, left, rank, 0), _of_rank(node, graph, right, rank, 1)]
    graph.layer("BinaryOp", operands, [result], {0: operation})


def _of_rank(node: Node, graph: Graph, name: str, rank: int, place: int) -> str:
    """A tensor with as many axes as the result: ncnn would align the axes of others by their sizes."""
    padded = f"{node.outputs[0]}.operand{place}"
    array = graph.constant(name)
    if array is not None:
        graph.memory(padded, _with_rank(node, array, rank))
        return padded
    shape = graph.shape(name)
    if len(shape) == rank:
        return name
    raise NotConvertible(f"{node}: operands of {len(shape)} and {rank} axes")


def _with_rank(node: Node, array: NDArray[Any], rank: int) -> NDArray[Any]:
    """A constant without the first axis of the result, with leading axes of size 1."""
    if array.ndim > rank:
        if array.ndim > rank + 1 or array.shape[0] != 1:
            raise NotConvertible(f"{node}: a constant of shape {array.shape}")
        array = array[0]
    return array.reshape((1,) * (max(rank, 1) - array.ndim) + array.shape)
