"""The float32 graph that is quantised: functions inlined, constants folded, its convolutions with their weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper

from stepcell.errors import ExportError
from stepcell.external_weights import has_external_weights, load_external_weights
from stepcell.library_errors import library_errors
from stepcell.limits import FIRST_STEP_SECONDS, within_seconds
from stepcell.onnx_model import OnnxFile
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32
from stepcell.runtime.backends.onnxruntime.trial import choose_level

__all__ = ["Convolution", "FlatGraph", "flat_graph"]

Array = NDArray[Any]

# What a factor for each channel passes through unchanged, if it is above zero.
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "Identity", "Resize"})
_WEIGHTED = {"Conv": 1, "ConvTranspose": 0}  # axis of the weights that counts input channels


@dataclass(frozen=True)
class Convolution:
    """A Conv node with constant float32 weights.

    Attributes:
        name: for people; unique in the graph.
        weight: (C_out, C_in / groups, k...).
        ranged: the tensor whose range its output needs: the output itself, or that of the Relu that alone reads it,
            since what is below zero is lost there.
    """

    name: str
    node: onnx.NodeProto
    weight: Array
    ranged: str

    @property
    def input(self) -> str:
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        return str(self.node.output[0])


class FlatGraph:
    """A float32 model of standard nodes, with what quantisation asks of it.

    Attributes:
        model: the model, without contract.
        convolutions: in the order of the nodes, by name.
        read_outside: outputs, and what graphs inside nodes read: these keep their names and values.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self.read_outside = {output.name for output in model.graph.output} | set(_captured(model.graph.node))
        self.convolutions = {each.name: each for each in self._find()}

    def channel_readers(self, tensor: str, first: int = 0) -> list[tuple[onnx.NodeProto, int]] | None:
        """The Conv and ConvTranspose nodes that read a tensor, and at which input channel its first one is.

        None: something else reads it too, for which a factor of a channel makes a difference.
        """
        if tensor in self.read_outside:
            return None
        found: list[tuple[onnx.NodeProto, int]] = []
        for node in self._readers.get(tensor, []):
            if node.op_type in _WEIGHTED and node.input[0] == tensor:
                if node.input[1] not in self.weights:
                    return None
                found.append((node, first))
                continue
            start = first
            if node.op_type == "Concat" and self._channel_axis(node):
                sizes = [self._sizes.get(name) for name in node.input[: list(node.input).index(tensor)]]
                if None in sizes or list(node.input).count(tensor) > 1:
                    return None
                start += sum(size or 0 for size in sizes)
            elif not _is_homogeneous(node) or node.input[0] != tensor:
                return None
            further = self.channel_readers(node.output[0], start)
            if further is None:
                return None
            found += further
        return found

    def _find(self) -> Iterator[Convolution]:
        taken: set[str] = set()
        for node in self.model.graph.node:
            constant = all(name in self.weights for name in node.input[1:] if name)
            if node.op_type != "Conv" or not constant:
                continue
            weight = numpy_helper.to_array(self.weights[node.input[1]])
            if weight.dtype != np.float32:
                continue
            name = node.name or node.output[0]
            while name in taken:
                name += "'"
            taken.add(name)
            readers = self._readers.get(node.output[0], [])
            alone = len(readers) == 1 and readers[0].op_type == "Relu" and node.output[0] not in self.read_outside
            yield Convolution(name, node, weight, readers[0].output[0] if alone else node.output[0])

    def _channel_axis(self, node: onnx.NodeProto) -> bool:
        return any(each.name == "axis" and each.i == 1 for each in node.attribute)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Number of channels of the tensors where the graph says it."""
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        found = {}
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            dims = value.type.tensor_type.shape.dim
            if len(dims) > 1 and dims[1].HasField("dim_value"):
                found[value.name] = int(dims[1].dim_value)
        return found


def _is_homogeneous(node: onnx.NodeProto) -> bool:
    to = next((each.i for each in node.attribute if each.name == "to"), None)
    return node.op_type in _HOMOGENEOUS or (node.op_type == "Cast" and to == onnx.TensorProto.FLOAT)


def _captured(nodes: Iterable[onnx.NodeProto], depth: int = 0) -> Iterator[str]:
    """Names that graphs inside nodes read."""
    for node in nodes:
        if depth:
            yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _captured(graph.node, depth + 1)
                yield from (output.name for output in graph.output)


def flat_graph(file: OnnxFile) -> FlatGraph:
    """The graph of an exported file in float32, of standard nodes only.

    Raises:
        ExportError: ONNX Runtime does not load it.
        InputError: its weights are in another file, which cannot be read.
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    if has_external_weights(model):
        load_external_weights(model, file.path)
    model = onnx.inliner.inline_local_functions(to_float32(model))
    folded = _folded(model.SerializeToString(), str(file.path))
    del folded.graph.input[:], folded.graph.output[:], folded.graph.value_info[:], folded.metadata_props[:]
    folded.graph.input.extend(model.graph.input)
    folded.graph.output.extend(model.graph.output)
    opset = next(each.version for each in folded.opset_import if each.domain in ("", "ai.onnx"))
    del folded.opset_import[:]
    folded.opset_import.append(onnx.helper.make_opsetid("", opset))
    if foreign := {node.domain for node in folded.graph.node} - {"", "ai.onnx"}:
        raise ExportError(f"{file.path}: has nodes of domain {min(foreign)}, which only some programs know")
    return FlatGraph(folded)


def _folded(data: bytes, subject: str) -> onnx.ModelProto:
    """With constants folded by ONNX Runtime, whose basic optimisations write standard nodes only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    choose_level(data, options, subject)
    with tempfile.TemporaryDirectory(prefix="stepcell-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        create = functools.partial(
            onnxruntime.InferenceSession, data, options, enable_fallback=0, providers=["CPUExecutionProvider"]
        )
        with library_errors(subject, ExportError, what="ONNX Runtime does not load it"):
            within_seconds(FIRST_STEP_SECONDS, create, f"{subject}: loading in ONNX Runtime")
            return onnx.load(options.optimized_model_filepath)
