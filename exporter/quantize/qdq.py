"""The int8 graph: channels brought to similar ranges, then QuantizeLinear and DequantizeLinear around convolutions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from stepcell.exporter.quantize.flat_graph import Convolution, FlatGraph

__all__ = ["int8_model"]

Array = NDArray[Any]
_LEVELS = 127  # symmetric: -127 to 127, so that zero is exact
_LEAST = 0.02  # of the largest range: a channel that is nearly silent is not blown up further


def int8_model(
    graph: FlatGraph, ranges: Mapping[str, NDArray[np.float32]], layers: Collection[str], equalization: float
) -> onnx.ModelProto:
    """The model with these convolutions in int8: weights, inputs and outputs; the rest stays in float32.

    Between two convolutions only their product counts, so a channel may be divided by s before and multiplied by s
    after it. With s the power `equalization` of its range, channels share the levels of the tensor's scale more
    fairly, and the results in float32 stay the same (cross-layer equalization, Nagel et al. 2019, arXiv 1906.04721).
    Where something else than convolutions reads the output, as the gates of a cell do, it is multiplied by s there.

    Args:
        ranges: by tensor, largest absolute value of each channel.
        layers: names of the convolutions.
        equalization: 0 to 1; 0: no scales.
    """
    return _Int8(graph, ranges, layers, equalization).model()


class _Int8:
    def __init__(
        self, graph: FlatGraph, ranges: Mapping[str, NDArray[np.float32]], layers: Collection[str], equalization: float
    ) -> None:
        self._graph, self._ranges, self._equalization = graph, ranges, equalization
        self._layers = {conv.output: conv for name, conv in graph.convolutions.items() if name in layers}
        self._weights: dict[str, Array] = {}  # changed ones, by the output of their node
        self._biases: dict[str, Array] = {}
        self._divided: dict[str, Array] = {}  # by convolution, by what its input channels were divided
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._renamed: dict[str, str] = {}
        self._quantized: dict[tuple[str, float], str] = {}

    def model(self) -> onnx.ModelProto:
        factors = {output: self._equalize(conv) for output, conv in self._layers.items()} if self._equalization else {}
        for node in self._graph.model.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for index, name in enumerate(copy.input):
                copy.input[index] = self._renamed.get(name, name)
            output = node.output[0] if node.output else ""
            if node.op_type in ("Conv", "ConvTranspose") and output in self._weights:
                copy.input[1] = self._constant(f"{output}/weight", self._weights[output])
            if output in self._biases:
                copy.input[2] = self._constant(f"{output}/bias", self._biases[output])
            if output in self._layers:
                self._add_int8(self._layers[output], copy, factors.get(output))
            else:
                self._nodes.append(copy)
        return self._assembled()

    def _equalize(self, conv: Convolution) -> Array | None:
        """Divide the output channels of a convolution; the factors, where its readers do not undo it."""
        known = self._ranges[conv.ranged]
        largest = float(known.max())
        if largest == 0:
            return None
        factors = (np.maximum(known / largest, _LEAST) ** self._equalization).astype(np.float32)
        readers = self._graph.channel_readers(conv.output)
        for node, first in readers or []:
            self._multiply_inputs(node, first, factors)
        self._weights[conv.output] = self._weight(conv.node) / _along(factors, conv.weight.ndim, 0)
        if len(conv.node.input) > 2 and conv.node.input[2]:
            bias = numpy_helper.to_array(self._graph.weights[conv.node.input[2]])
            self._biases[conv.output] = bias / factors
        return None if readers else factors

    def _weight(self, node: onnx.NodeProto) -> Array:
        own = self._weights.get(node.output[0])
        return numpy_helper.to_array(self._graph.weights[node.input[1]]) if own is None else own

    def _multiply_inputs(self, node: onnx.NodeProto, first: int, factors: Array) -> None:
        weight = self._weight(node)
        groups = next((int(each.i) for each in node.attribute if each.name == "group"), 1)
        if node.op_type == "ConvTranspose":  # (C_in, C_out / groups, k...)
            whole = np.ones(weight.shape[0], np.float32)
            whole[first : first + len(factors)] = factors
            self._weights[node.output[0]] = weight * _along(whole, weight.ndim, 0)
            return
        whole = np.ones(weight.shape[1] * groups, np.float32)
        whole[first : first + len(factors)] = factors
        by_group = whole.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        split = weight.reshape(groups, -1, *weight.shape[1:])
        self._weights[node.output[0]] = (split * by_group).reshape(weight.shape)
        self._divided[node.output[0]] = self._divided.get(node.output[0], np.ones(len(whole), np.float32)) * whole

    def _input_range(self, conv: Convolution) -> float:
        return float((self._ranges[conv.input] / self._divided.get(conv.output, 1)).max())

    def _add_int8(self, conv: Convolution, node: onnx.NodeProto, factors: Array | None) -> None:
        node.name = conv.name  # an engine lists its layers by it
        node.input[0] = self._around(node.input[0], self._input_range(conv))
        node.input[1] = self._int8_weight(conv)
        largest = float(self._ranges[conv.ranged].max())  # that of its loudest channel, whose factor is 1
        if conv.output in self._graph.read_outside:  # the name belongs to what is read from outside
            node.output[0] = f"{conv.output}/convolution"
        self._nodes.append(node)
        result = self._around(node.output[0], largest)
        if factors is not None:
            shape = (-1, *[1] * (conv.weight.ndim - 2))
            factor = self._constant(f"{conv.output}/factor", factors.reshape(shape))
            self._nodes.append(onnx.helper.make_node("Mul", [result, factor], [f"{conv.output}/scaled"]))
            result = f"{conv.output}/scaled"
        self._renamed[conv.output] = result
        if conv.output in self._graph.read_outside:
            self._nodes.append(onnx.helper.make_node("Identity", [result], [conv.output]))

    def _around(self, tensor: str, largest: float) -> str:
        """The tensor after a QuantizeLinear and a DequantizeLinear of its own."""
        scale = np.float32(max(largest, 1e-30) / _LEVELS)
        key = (tensor, float(scale))
        if key not in self._quantized:
            name = f"{tensor}/int8" if all(tensor != other for other, _ in self._quantized) else f"{tensor}/int8_again"
            ends = [self._constant(f"{name}/scale", scale), self._constant(f"{name}/zero", np.int8(0))]
            self._nodes += [
                onnx.helper.make_node("QuantizeLinear", [tensor, *ends], [name], f"{name}/QuantizeLinear"),
                onnx.helper.make_node("DequantizeLinear", [name, *ends], [f"{name}/float"], f"{name}/DequantizeLinear"),
            ]
            self._quantized[key] = f"{name}/float"
        return self._quantized[key]

    def _int8_weight(self, conv: Convolution) -> str:
        weight = self._weight(conv.node)
        rows = np.abs(weight).reshape(len(weight), -1).max(1)
        scales = (np.where(rows > 0, rows, 1) / _LEVELS).astype(np.float32)
        levels = np.clip(np.rint(weight / _along(scales, weight.ndim, 0)), -_LEVELS, _LEVELS).astype(np.int8)
        name = f"{conv.output}/weight_int8"
        inputs = [
            self._constant(name, levels),
            self._constant(f"{name}/scale", scales),
            self._constant(f"{name}/zero", np.zeros(len(scales), np.int8)),
        ]
        made = onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}/float"], f"{name}/DequantizeLinear", axis=0)
        self._nodes.append(made)
        return f"{name}/float"

    def _constant(self, name: str, value: Any) -> str:
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _assembled(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input} | self._graph.read_outside
        kept = {**self._graph.weights, **self._constants}
        model.graph.initializer.extend(tensor for name, tensor in kept.items() if name in used)
        return model


def _along(vector: Array, ndim: int, axis: int) -> Array:
    return vector.reshape([-1 if each == axis else 1 for each in range(ndim)])
