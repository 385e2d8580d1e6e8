"""Readers of ONNX files: any model, or an exported one with its contract."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import ContractError, InputError
from stepcell.files import read_bytes
from stepcell.optional_imports import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["OnnxFile", "external_files", "read_model", "read_onnx", "tensors_of"]


@dataclass(frozen=True)
class OnnxFile:
    """An exported model.

    Attributes:
        path: path of the file.
        data: its bytes.
        sha256: of the bytes.
        model: `data`, decoded.
        contract: from its metadata.
    """

    path: Path
    data: bytes
    sha256: str
    model: ModelProto
    contract: StepContract


def read_model(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of a file and the model in them. External weights are not read.

    Raises:
        InputError: it cannot be read or is not an ONNX model.
        MissingDependencyError: onnx is not installed.
    """
    onnx = require("onnx", extra="rtx", purpose="reading a model")
    data = read_bytes(path)
    model: ModelProto = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # DecodeError of protobuf, whose module depends on the implementation
        raise InputError(f"{path}: is not an ONNX model ({error})") from error
    if not model.graph.node:
        raise InputError(f"{path}: is not an ONNX model, or has an empty graph")
    return data, model


def read_onnx(path: Path) -> OnnxFile:
    """Read an exported model and the contract in its metadata.

    Raises:
        InputError: the file cannot be read or is not an ONNX model.
        ContractError: it holds no contract, or one that cannot be used.
        MissingDependencyError: onnx is not installed.
    """
    data, model = read_model(path)
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        raise ContractError(
            f"{path}: has no state contract (metadata {METADATA_KEY!r}), so its states are unknown",
            hint="export it with `stepcell export`, which writes the contract into the file",
        )
    contract = StepContract.from_json(text, subject=f"{path}: contract")
    return OnnxFile(path, data, hashlib.sha256(data).hexdigest(), model, contract)


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every constant tensor of a model: of its graph, of graphs inside nodes, and of its functions."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _in_graph(inner)


def external_files(model: ModelProto) -> set[str]:
    """Names of the files in which a model says that its weights lie, as it spells them; they are not trusted."""
    entries = (entry for tensor in tensors_of(model) for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location" and entry.value}
