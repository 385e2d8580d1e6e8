"""Normalisation, softmax and means."""

from __future__ import annotations

import numpy as np

from stepcell.runtime.backends.ncnn.graph import Graph, NotConvertible, plain
from stepcell.runtime.backends.ncnn.operators.registry import Node, axis_of, writes

__all__: list[str] = []


@writes("BatchNormalization")
def batch_norm(node: Node, graph: Graph) -> None:
    if node.get("training_mode", 0):
        raise NotConvertible(f"{node}: in training mode")
    scale, bias, mean, variance = (node.weights(graph, number) for number in range(1, 5))
    weights = [plain(array) for array in (scale, mean, variance, bias)]
    graph.layer("BatchNorm", node.inputs[:1], node.outputs, {0: scale.size, 1: node.get("epsilon", 1e-5)}, weights)


@writes("InstanceNormalization")
def instance_norm(node: Node, graph: Graph) -> None:
    scale, bias = node.weights(graph, 1), node.weights(graph, 2)
    parameters = {0: scale.size, 1: node.get("epsilon", 1e-5), 2: 1}
    graph.layer("InstanceNorm", node.inputs[:1], node.outputs, parameters, [plain(scale), plain(bias)])


@writes("GroupNormalization")
def group_norm(node: Node, graph: Graph) -> None:
    scale, bias = node.weights(graph, 1), node.weights(graph, 2)
    channels = graph.shape(node.inputs[0])[0]
    if scale.size != channels:
        raise NotConvertible(f"{node}: expected a scale for each channel, got {scale.size}")
    parameters = {0: node.get("num_groups"), 1: channels, 2: node.get("epsilon", 1e-5), 3: 1}
    graph.layer("GroupNorm", node.inputs[:1], node.outputs, parameters, [plain(scale), plain(bias)])


@writes("LayerNormalization")
def layer_norm(node: Node, graph: Graph) -> None:
    shape = graph.shape(node.inputs[0])
    scale = node.weights(graph, 1)
    bias = node.weights(graph, 2) if node.input(2) else np.zeros_like(scale)
    first = axis_of(node, node.get("axis", -1), len(shape) + 1)
    if len(node.outputs) > 1 or scale.shape != shape[first:]:
        raise NotConvertible(f"{node}: expected a scale for each element, got {scale.shape} for {shape}")
    parameters = {0: scale.size, 1: node.get("epsilon", 1e-5), 2: 1}
    graph.layer("LayerNorm", node.inputs[:1], node.outputs, parameters, [plain(scale), plain(bias)])


@writes("Softmax")
def softmax(node: Node, graph: Graph) -> None:
    axis = axis_of(node, node.get("axis", -1), len(graph.shape(node.inputs[0])) + 1)
    graph.layer("Softmax", node.inputs, node.outputs, {0: axis, 1: 1})


@writes("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def reduction(node: Node, graph: Graph) -> None:
    rank = len(graph.shape(node.inputs[0])) + 1
    axes = node.integers(graph, "axes", 1)
    if not axes:
        raise NotConvertible(f"{node}: over all axes")
    kind = {"ReduceSum": 0, "ReduceMean": 3, "ReduceMax": 4, "ReduceMin": 5}[node.op]
    found = [axis_of(node, axis, rank) for axis in axes]
    parameters = {0: kind, 1: 0, 3: found, 4: node.get("keepdims", 1), 5: 1}
    graph.layer("Reduction", node.inputs[:1], node.outputs, parameters)
