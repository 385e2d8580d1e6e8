"""The int8 graph: channels brought to similar ranges, then QuantizeLinear and DequantizeLinear around convolutions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from stepcell.exporter.quantize.calibrate import Calibration
from stepcell.exporter.quantize.flat_graph import Convolution, FlatGraph
from stepcell.exporter.quantize.rounding import LEVELS, round_weight

__all__ = ["Quantizer"]

Array = NDArray[Any]
_EQUAL = 1e-5  # relative difference of ranges that differ by rounding only
_LEAST = 0.02  # of the largest range: a channel that is nearly silent is not blown up further


class Quantizer:
    """Makes int8 models of a graph.

    Between two convolutions only their product counts, so a channel may be divided by s before and multiplied by s
    after it. With s the power `equalization` of its range, channels share the levels of the tensor's scale more
    fairly, and the results in float32 stay the same (cross-layer equalization, Nagel et al. 2019, arXiv 1906.04721).
    Where something else than convolutions reads the output, as the gates of a cell do, it is multiplied by s there.
    """

    def __init__(self, graph: FlatGraph, calibration: Calibration) -> None:
        self._graph, self._calibration = graph, calibration
        self._rounded: dict[tuple[str, bytes], tuple[Array, Array, Array]] = {}

    def model(self, quantile: float, layers: Collection[str], equalization: float) -> onnx.ModelProto:
        """The model with these convolutions in int8: weights, inputs and outputs; the rest stays in float32.

        Args:
            quantile: the ranges to take, one of those of the calibration.
            layers: names of the convolutions.
            equalization: 0 to 1; 0: no scales.
        """
        return _Int8(self._graph, self._calibration.ranges[quantile], layers, equalization, self.round).model()

    def round(self, conv: Convolution, weight: Array, divided: Array | None) -> tuple[Array, Array, Array]:
        """`round_weight`, once for the same weights."""
        key = (conv.name, hashlib.sha256(weight.tobytes()).digest())  # which show by what the input was divided
        if key not in self._rounded:
            self._rounded[key] = round_weight(weight, self._calibration.moments.get(conv.name), divided)
        return self._rounded[key]


class _Int8:
    def __init__(
        self,
        graph: FlatGraph,
        ranges: Mapping[str, NDArray[np.float32]],
        layers: Collection[str],
        equalization: float,
        round_weight: Callable[[Convolution, Array, Array | None], tuple[Array, Array, Array]],
    ) -> None:
        self._graph, self._ranges, self._equalization, self._round = graph, ranges, equalization, round_weight
        self._layers = {conv.output: conv for name, conv in graph.convolutions.items() if name in layers}
        self._weights: dict[str, Array] = {}  # changed ones, by the output of their node
        self._biases: dict[str, Array] = {}
        self._divided: dict[str, Array] = {}  # by convolution, by what its input channels were divided
        self._largest: dict[str, float] = {}  # by convolution, of its outputs
        self._read: dict[str, set[float]] = {}  # by convolution, the largest of those whose outputs it reads
        self._scaled = self._scaled_channels()
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._renamed: dict[str, str] = {}
        self._quantized: dict[tuple[str, float], str] = {}

    def model(self) -> onnx.ModelProto:
        convolutions = self._graph.convolutions.values() if self._equalization else ()
        factors = {conv.output: self._equalize(conv) for conv in convolutions}
        for node in self._graph.model.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for index, name in enumerate(copy.input):
                copy.input[index] = self._renamed.get(name, name)
            output = node.output[0] if node.output else ""
            if node.op_type in ("Conv", "ConvTranspose") and output in self._weights:
                copy.input[1] = self._constant(f"{output}/weight", self._weights[output])
            if output in self._biases and len(copy.input) > 2:
                copy.input[2] = self._constant(f"{output}/bias", self._biases[output])
            if output in self._layers:
                self._add_int8(self._layers[output], copy, factors.get(output))
            else:
                self._nodes.append(copy)
        return self._assembled()

    def _equalize(self, conv: Convolution) -> Array | None:
        """Divide the output channels of a convolution; the factors, where its readers do not undo it.

        One that stays in float32 is divided too where its readers undo it: they may be int8.
        """
        known = self._ranges[conv.ranged]
        largest = float(known.max())
        readers = self._graph.channel_readers(conv.output)
        if largest == 0 or (not readers and conv.output not in self._layers):
            return None
        factors = (np.maximum(known / largest, _LEAST) ** self._equalization).astype(np.float32)
        if readers:
            self._largest[conv.output] = self._joined_range(readers) or 1.0
            factors *= np.float32(largest / self._largest[conv.output])
        for node, first in readers or []:
            self._multiply_inputs(node, first, factors)
            self._read.setdefault(node.output[0], set()).add(self._largest[conv.output])
        self._weights[conv.output] = self._weight(conv.node) / _along(factors, conv.weight.ndim, 0)
        self._biases[conv.output] = self._bias(conv) / factors
        return None if readers else factors

    def _weight(self, node: onnx.NodeProto) -> Array:
        own = self._weights.get(node.output[0])
        return numpy_helper.to_array(self._graph.weights[node.input[1]]) if own is None else own

    def _bias(self, conv: Convolution) -> Array:
        if conv.output in self._biases:
            return self._biases[conv.output]
        named = conv.node.input[2] if len(conv.node.input) > 2 else ""
        return numpy_helper.to_array(self._graph.weights[named]) if named else np.zeros(len(conv.weight), np.float32)

    def _joined_range(self, readers: Sequence[tuple[onnx.NodeProto, int]]) -> float:
        """The range of the channels that int8 convolutions read with these and that cannot be scaled; 0: none.

        They share a scale with these. Such a channel is one of a state.
        """
        fixed = [
            self._ranges[reader.input][~self._scaled[reader.output]]
            for node, _ in readers
            if (reader := self._layers.get(node.output[0])) is not None
        ]
        return max((float(each.max(initial=0)) for each in fixed), default=0.0)

    def _scaled_channels(self) -> dict[str, NDArray[np.bool_]]:
        """By int8 convolution, which of its input channels come from one whose channels are scaled."""
        found = {output: np.zeros(len(self._ranges[conv.input]), bool) for output, conv in self._layers.items()}
        for conv in self._graph.convolutions.values():
            for node, first in self._graph.channel_readers(conv.output) or []:
                if node.output[0] in found:
                    found[node.output[0]][first : first + len(conv.weight)] = True
        return found

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
        """The largest input; to the last bit that of the outputs it reads, so that their bytes are passed on."""
        found = float((self._ranges[conv.input] / self._divided.get(conv.output, 1)).max())
        return next((each for each in self._read.get(conv.output, ()) if abs(found / each - 1) < _EQUAL), found)

    def _add_int8(self, conv: Convolution, node: onnx.NodeProto, factors: Array | None) -> None:
        node.name = conv.name  # an engine lists its layers by it
        node.input[0] = self._around(node.input[0], self._input_range(conv))
        weight, correction = self._int8_weight(conv)
        node.input[1:] = [weight, self._constant(f"{conv.output}/bias", self._bias(conv) + correction)]
        largest = self._largest.get(conv.output) or float(self._ranges[conv.ranged].max())
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
        scale = np.float32(max(largest, 1e-30) / LEVELS)
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

    def _int8_weight(self, conv: Convolution) -> tuple[str, Array]:
        """Name of the weights as floats, and what the bias must make up for."""
        levels, scales, correction = self._round(conv, self._weight(conv.node), self._divided.get(conv.output))
        name = f"{conv.output}/weight_int8"
        inputs = [
            self._constant(name, levels),
            self._constant(f"{name}/scale", scales),
            self._constant(f"{name}/zero", np.zeros(len(scales), np.int8)),
        ]
        made = onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}/float"], f"{name}/DequantizeLinear", axis=0)
        self._nodes.append(made)
        return f"{name}/float", correction

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
