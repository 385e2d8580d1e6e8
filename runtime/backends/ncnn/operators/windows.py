"""Convolutions, pooling and matrix products."""

from __future__ import annotations

import numpy as np

from stepcell.runtime.backends.ncnn.graph import Graph, NotConvertible, Parameter, coded, plain
from stepcell.runtime.backends.ncnn.operators.registry import Node, writes

__all__: list[str] = []


@writes("Conv")
def convolution(node: Node, graph: Graph) -> None:
    kernel = node.weights(graph, 1)
    shape = _map(node, graph)
    strides, dilations = node.get("strides", [1, 1]), node.get("dilations", [1, 1])
    pads = _pads(node, shape[1:], kernel.shape[2:], strides, dilations)
    _convolution(node, graph, "Convolution", kernel, kernel.shape[0], strides, dilations, pads, {})


@writes("ConvTranspose")
def transposed_convolution(node: Node, graph: Graph) -> None:
    kernel = node.weights(graph, 1)
    _map(node, graph)
    if node.get("auto_pad", "NOTSET") != "NOTSET" or node.get("output_shape"):
        raise NotConvertible(f"{node}: padding that follows from its output")
    group = node.get("group", 1)
    inputs, outputs = kernel.shape[:2]
    kernel = kernel.reshape(group, inputs // group, outputs, *kernel.shape[2:]).swapaxes(1, 2)
    extra: dict[int, Parameter] = dict(zip((19, 18), node.get("output_padding", [0, 0]), strict=True))
    strides, dilations = node.get("strides", [1, 1]), node.get("dilations", [1, 1])
    pads = node.get("pads", [0, 0, 0, 0])
    _convolution(node, graph, "Deconvolution", kernel, outputs * group, strides, dilations, pads, extra)


def _convolution(
    node: Node,
    graph: Graph,
    kind: str,
    kernel: np.ndarray,
    outputs: int,
    strides: list[int],
    dilations: list[int],
    pads: list[int],
    extra: dict[int, Parameter],
) -> None:
    """One layer; its parameters have the same numbers in convolutions of every kind."""
    group, has_bias = node.get("group", 1), bool(node.input(2))
    weights = [coded(kernel), *([plain(node.weights(graph, 2))] if has_bias else [])]
    parameters: dict[int, Parameter] = {
        0: outputs,
        1: kernel.shape[-1],
        11: kernel.shape[-2],
        2: dilations[1],
        12: dilations[0],
        3: strides[1],
        13: strides[0],
        14: pads[0],
        4: pads[1],
        16: pads[2],
        15: pads[3],
        5: int(has_bias),
        6: kernel.size,
        **extra,
    }
    if group > 1:
        kind, parameters[7] = f"{kind}DepthWise", group
    graph.layer(kind, node.inputs[:1], node.outputs, parameters, weights)


@writes("MaxPool", "AveragePool")
def pooling(node: Node, graph: Graph) -> None:
    shape = _map(node, graph)
    kernel, strides = node.get("kernel_shape"), node.get("strides", [1, 1])
    dilations = node.get("dilations", [1, 1])
    pads = _pads(node, shape[1:], kernel, strides, dilations)
    left_over = [
        (size + pads[axis] + pads[axis + 2] - kernel[axis]) % strides[axis] for axis, size in enumerate(shape[1:])
    ]
    if dilations != [1, 1] or len(node.outputs) > 1 or (node.get("ceil_mode", 0) and any(left_over)):
        raise NotConvertible(f"{node}: dilated, with indices, or with a last window that is not whole")
    parameters: dict[int, Parameter] = {
        0: int(node.op == "AveragePool"),
        1: kernel[1],
        11: kernel[0],
        2: strides[1],
        12: strides[0],
        13: pads[0],
        3: pads[1],
        15: pads[2],
        14: pads[3],
        5: 1,
        6: node.get("count_include_pad", 0),
    }
    graph.layer("Pooling", node.inputs, node.outputs, parameters)


@writes("GlobalAveragePool", "GlobalMaxPool")
def global_pooling(node: Node, graph: Graph) -> None:
    channels = _map(node, graph)[0]
    pooled = f"{node.outputs[0]}.pooled"
    graph.layer("Pooling", node.inputs, [pooled], {0: int(node.op == "GlobalAveragePool"), 4: 1})
    graph.layer("Reshape", [pooled], node.outputs, {0: 1, 1: 1, 2: channels})


@writes("Gemm")
def gemm(node: Node, graph: Graph) -> None:
    if node.get("transA", 0) or len(graph.shape(node.inputs[0])) != 1:
        raise NotConvertible(f"{node}: expected rows of numbers that are not transposed")
    weights = node.weights(graph, 1) * np.float32(node.get("alpha", 1.0))
    weights = weights if node.get("transB", 0) else weights.T
    bias = np.zeros(len(weights), np.float32)
    if node.input(2):
        bias = np.broadcast_to(node.weights(graph, 2) * np.float32(node.get("beta", 1.0)), (1, len(weights)))[0]
    _product(node, graph, weights, bias)


@writes("MatMul")
def matrix_product(node: Node, graph: Graph) -> None:
    weights = node.weights(graph, 1)
    if weights.ndim != 2 or len(graph.shape(node.inputs[0])) not in (1, 2):
        raise NotConvertible(f"{node}: expected a product with a matrix of weights")
    _product(node, graph, weights.T, np.zeros(weights.shape[1], np.float32))


def _product(node: Node, graph: Graph, weights: np.ndarray, bias: np.ndarray) -> None:
    parameters = {0: len(weights), 1: 1, 2: weights.size}
    graph.layer("InnerProduct", node.inputs[:1], node.outputs, parameters, [coded(weights), plain(bias)])


def _map(node: Node, graph: Graph) -> tuple[int, ...]:
    """Channels, height and width of the first input."""
    shape = graph.shape(node.inputs[0])
    if len(shape) != 3:
        raise NotConvertible(f"{node}: expected channels, height and width, got {shape}")
    return shape


def _pads(
    node: Node, size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[int]:
    """Padding above, left, below and right."""
    mode = node.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(node.get("pads", [0, 0, 0, 0]))
    if mode == "VALID":
        return [0, 0, 0, 0]
    before, after = [], []
    for axis in range(2):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        total = max(0, (-(-size[axis] // strides[axis]) - 1) * strides[axis] + reach - size[axis])
        half = total // 2
        before.append(total - half if mode == "SAME_LOWER" else half)
        after.append(total - before[-1])
    return before + after
