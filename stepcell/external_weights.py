"""Weights that an ONNX file keeps in files beside it. The file names them, and it is not trusted.

`check_external_weights` is applied to every model that is read, before a library gets it or its path: ONNX Runtime and
onnx open what a file names themselves, and older versions of both follow `..`, absolute paths and links.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.errors import InputError
from stepcell.files import read_bytes

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

__all__ = ["ONE_FILE", "check_external_weights", "has_external_weights", "load_external_weights", "tensors_of"]

_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
ONE_FILE = 2**31 - 1  # bytes of one protobuf message


def has_external_weights(model: ModelProto) -> bool:
    """Whether a constant of the model lies in another file."""
    return any(tensor.data_location == _EXTERNAL for tensor in tensors_of(model))


def check_external_weights(model: ModelProto, path: Path) -> int:
    """Refuse a model with weights anywhere but in its own file or in plain files of the same folder.

    Returns:
        Bytes of these files.

    Raises:
        InputError: a location with a folder in it, an absolute one, a symbolic or hard link, a file that is missing, a
            device, a location given twice, or a range of bytes that is no range.
    """
    checked: dict[str, int] = {}
    for tensor in tensors_of(model):
        if tensor.data_location != _EXTERNAL and not tensor.external_data:
            continue
        keys = [entry.key for entry in tensor.external_data]
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(set(keys)) < len(keys):  # each reader could take another of them
            raise InputError(f"{path}: weights {tensor.name!r}: where they are is given twice")
        if min(_number(entries, "offset", 0), _number(entries, "length", 0)) < 0:
            raise InputError(f"{path}: weights {tensor.name!r}: offset and length are not numbers of bytes")
        location = entries.get("location", "")
        if location not in checked:
            checked[location] = _beside(path, location, tensor.name).stat().st_size
    return sum(checked.values())


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
    """The path of a file with weights, which is plain: no link, nothing outside the folder."""
    plain = location not in ("", ".", "..") and Path(location).name == location and not set(location) & {"\\", "\0"}
    why = "" if plain else "it names a folder"
    if plain:
        try:
            status = (path.parent / location).lstat()
        except OSError as error:
            raise InputError(
                f"{path}: weights {tensor!r} are in {location!r} beside it, which cannot be read ({error.strerror})",
                hint="copy the file with the weights too",
            ) from error
        if not stat.S_ISREG(status.st_mode):
            why = "it is a symbolic link" if stat.S_ISLNK(status.st_mode) else "it is no file"
        elif status.st_nlink > 1:
            why = "it is a hard link"
    if why:
        raise InputError(
            f"{path}: weights {tensor!r} are in {location!r}; only a plain file in the same folder is opened ({why})",
            hint="if you trust the file, copy what it names into its folder, or save it as one with onnx",
        )
    return path.parent / location


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    return int(text) if text.isascii() and text.isdigit() else -1


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every constant tensor of a model: of its graph, of graphs inside nodes, and of its functions."""
    yield from _in_graph(model.graph)
    for training in model.training_info:
        yield from _in_graph(training.initialization)
        yield from _in_graph(training.algorithm)
    for function in model.functions:
        yield from _in_attributes(function.attribute_proto)
        yield from _in_nodes(function.node)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _in_sparse(graph.sparse_initializer)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        yield from _in_attributes(node.attribute)


def _in_attributes(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        yield from _in_sparse((attribute.sparse_tensor, *attribute.sparse_tensors))
        for inner in (attribute.g, *attribute.graphs):
            yield from _in_graph(inner)


def _in_sparse(tensors: Iterable[SparseTensorProto]) -> Iterator[TensorProto]:
    for sparse in tensors:
        yield from (sparse.values, sparse.indices)
