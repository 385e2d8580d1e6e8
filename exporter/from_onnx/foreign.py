"""Reader of ONNX files that have no contract yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import METADATA_KEY
from stepcell.errors import UsageError
from stepcell.exporter.from_onnx.external import take_in
from stepcell.exporter.from_onnx.ports import Port, ports_of
from stepcell.onnx_model import read_model

__all__ = ["Foreign", "read_foreign", "tensors_of"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Foreign:
    """A file as it came.

    Attributes:
        data: the model with all its weights; `sha256` is that of the file.
    """

    path: Path
    data: bytes
    sha256: str
    model: onnx.ModelProto
    inputs: list[Port]
    outputs: list[Port]

    @property
    def opset(self) -> int:
        return next((int(item.version) for item in self.model.opset_import if item.domain in ("", "ai.onnx")), 0)

    @property
    def precision(self) -> Literal["float16", "float32"]:
        """Dtype of the larger part of the weights."""
        sizes: dict[int, int] = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
        for tensor in tensors_of(self.model):
            if tensor.data_type in sizes:
                sizes[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
        return "float16" if sizes[onnx.TensorProto.FLOAT16] > sizes[onnx.TensorProto.FLOAT] else "float32"


def read_foreign(path: Path) -> Foreign:
    """Read a file that has no contract yet, and weights that lie beside it.

    Raises:
        InputError: it cannot be read or is not an ONNX model.
        UsageError: it has a contract already.
        ExportError: its weights cannot be had, or its inputs and outputs are no tensors.
    """
    data, model = read_model(path)
    if any(entry.key == METADATA_KEY for entry in model.metadata_props):
        raise UsageError(f"{path}: has a state contract already", hint="`stepcell build` and `run` take it as it is")
    digest = hashlib.sha256(data).hexdigest()
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_of(model)):
        take_in(tensors_of(model), path)
        data = model.SerializeToString()
    inputs, outputs = ports_of(model, path)
    return Foreign(path, data, digest, model, inputs, outputs)


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant tensor of a model: of its graph, of graphs inside nodes, and of its functions."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _in_graph(inner)
