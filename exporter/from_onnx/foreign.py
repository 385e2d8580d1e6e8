"""Reading somebody else's ONNX file, and running it as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import METADATA_KEY
from stepcell.errors import ExportError, UsageError
from stepcell.exporter.from_onnx.external import take_in
from stepcell.exporter.from_onnx.ports import Port, ports_of
from stepcell.onnx_model import read_model

__all__ = ["Foreign", "Run", "read_foreign", "run_session", "tensors_of"]

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


class Run:
    """A model in ONNX Runtime on the CPU: arrays by name in, arrays by name out."""

    def __init__(self, data: bytes, subject: str) -> None:
        """Load it.

        Raises:
            ExportError: ONNX Runtime does not.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class per failure and no common base
            raise ExportError(f"{subject}: ONNX Runtime does not load it: {_first_line(error)}") from error
        self._subject = subject
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One step.

        Raises:
            ExportError: it fails with these inputs.
        """
        try:
            return dict(zip(self._names, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise ExportError(f"{self._subject}: the step fails in ONNX Runtime: {_first_line(error)}") from error


def run_session(run: Run, feeds: Mapping[str, Array]) -> dict[str, Array] | None:
    """`run`, or None where it fails: some sizes are no sizes of a model."""
    try:
        return run(feeds)
    except ExportError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
