"""Weights that an ONNX file keeps in files beside it. The file names them, and it is not trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.errors import InputError
from stepcell.files import read_bytes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["ONE_FILE", "has_external_weights", "load_external_weights", "tensors_of"]

_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
ONE_FILE = 2**31 - 1  # bytes of one protobuf message


def has_external_weights(model: ModelProto) -> bool:
    """Whether a constant of the model lies in another file."""
    return any(tensor.data_location == _EXTERNAL for tensor in tensors_of(model))


def load_external_weights(model: ModelProto, path: Path, *, limit: int | None = None) -> None:
    """Read the weights that are stored in files beside an ONNX file, such as `model.onnx.data`, into the model.

    Only a plain file in the same folder is opened.

    Args:
        path: the ONNX file.
        limit: number of bytes to read at most, such as `ONE_FILE`; None: any.

    Raises:
        InputError: a location that is not a plain file of the same folder, a file that cannot be read, bytes that it
            does not have, or more of them than `limit`.
    """
    files: dict[str, bytes] = {}
    total = 0
    for tensor in tensors_of(model):
        if tensor.data_location != _EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            files[location] = read_bytes(_beside(path, location, tensor.name))
        data = files[location]
        start, length = _number(entries, "offset", 0), _number(entries, "length", len(data))
        if start < 0 or length < 0 or start + length > len(data):
            raise InputError(
                f"{path}: weights {tensor.name!r} are bytes {start} to {start + length} of {location!r}, which has "
                f"{len(data)}",
                hint="the two files do not belong together, or one is truncated",
            )
        total += length
        if limit is not None and total > limit:
            raise InputError(f"{path}: more than {limit >> 20} MiB of weights do not fit into one ONNX file")
        tensor.raw_data = data[start : start + length]
        del tensor.external_data[:]
        tensor.ClearField("data_location")


def _beside(path: Path, location: str, tensor: str) -> Path:
    beside = path.parent / location
    plain = location not in ("", ".", "..") and Path(location).name == location and "\\" not in location
    if not plain or beside.is_symlink() or (beside.exists() and not beside.is_file()):
        raise InputError(
            f"{path}: weights {tensor!r} are in {location!r}; only a plain file in the same folder is opened",
            hint="if you trust the file, save it as one: onnx.save(onnx.load(path), path)",
        )
    return beside


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    return int(text) if text.isascii() and text.isdigit() else -1


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
