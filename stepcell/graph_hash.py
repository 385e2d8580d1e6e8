"""SHA-256 of an ONNX graph and its weights, by which an exported file is found to be unchanged.

It covers what a runtime computes with: opset versions, inputs, outputs, nodes, attributes, constants and functions,
with all names. How the file is written makes no difference: the order of the weights, weights as raw bytes, as numbers
or in another file, spellings with the same meaning, comments, metadata and inferred shapes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stepcell.optional_imports import require

if TYPE_CHECKING:
    from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

__all__ = ["graph_sha256"]

_STANDARD = "ai.onnx"  # also written as ""


def graph_sha256(model: ModelProto) -> str:
    """The hash as 64 hexadecimal digits.

    Args:
        model: with its weights in memory.

    Raises:
        ValueError: a constant whose bytes do not fit its shape, or weights that are still in another file.
        MissingDependencyError: onnx is not installed.
    """
    require("onnx", extra="ort", purpose="reading a model")
    return _Hasher().of_model(model)


class _Hasher:
    """Hashes values one after the other; each is preceded by its kind and its length, so that none can pass for two."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def of_model(self, model: ModelProto) -> str:
        self._opsets(model.opset_import)
        self._graph(model.graph)
        self._sorted(model.functions, lambda function: (function.domain, function.name, function.overload))
        for function in sorted(model.functions, key=_function_key):
            self._function(function)
        return self._digest.hexdigest()

    def _bytes(self, kind: bytes, data: Any) -> None:
        view = memoryview(data)
        self._digest.update(kind + struct.pack("<Q", view.nbytes))
        self._digest.update(view)

    def _text(self, text: str | bytes) -> None:
        self._bytes(b"s", text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)

    def _texts(self, texts: Iterable[str | bytes]) -> None:
        listed = list(texts)
        self._number(len(listed))
        for text in listed:
            self._text(text)

    def _number(self, number: int) -> None:
        self._digest.update(b"i" + struct.pack("<q", number))

    def _sorted(self, items: Sequence[Any], key: Callable[[Any], tuple[str, ...]]) -> None:
        """The keys of items that are hashed after this, so that a missing one differs."""
        self._texts("\0".join(name) for name in sorted(map(key, items)))

    def _opsets(self, imports: Iterable[Any]) -> None:
        for domain, version in sorted({(_domain(item.domain), int(item.version)) for item in imports}):
            self._text(domain)
            self._number(version)

    def _graph(self, graph: GraphProto) -> None:
        for ports in (graph.input, graph.output):
            self._number(len(ports))
            for port in ports:
                self._port(port)
        self._sorted(graph.initializer, lambda tensor: (tensor.name,))
        for tensor in sorted(graph.initializer, key=_name):
            self._tensor(tensor)
        self._sorted(graph.sparse_initializer, lambda sparse: (sparse.values.name,))
        for sparse in sorted(graph.sparse_initializer, key=lambda each: str(each.values.name)):
            self._sparse(sparse)
        self._nodes(graph.node)

    def _port(self, port: ValueInfoProto) -> None:
        self._text(port.name)
        kind = port.type.WhichOneof("value")
        if kind != "tensor_type":
            self._bytes(b"t", port.type.SerializeToString(deterministic=True))
            return
        tensor = port.type.tensor_type
        self._number(tensor.elem_type)
        self._number(len(tensor.shape.dim) if tensor.HasField("shape") else -1)
        for dim in tensor.shape.dim:
            self._text(str(dim.dim_value) if dim.HasField("dim_value") else f"={dim.dim_param}")

    def _function(self, function: FunctionProto) -> None:
        self._opsets(function.opset_import)
        for names in (function.input, function.output, function.attribute):
            self._texts(names)
        self._attributes(function.attribute_proto)
        self._nodes(function.node)

    def _nodes(self, nodes: Sequence[NodeProto]) -> None:
        self._number(len(nodes))
        for node in nodes:
            for text in (_domain(node.domain), node.op_type, node.overload, node.name):
                self._text(text)
            self._texts(_without_empty_ends(node.input))
            self._texts(_without_empty_ends(node.output))
            self._attributes(node.attribute)

    def _attributes(self, attributes: Sequence[AttributeProto]) -> None:
        self._number(len(attributes))
        for attribute in sorted(attributes, key=_name):
            self._text(attribute.name)
            self._text(attribute.ref_attr_name)
            self._number(attribute.type)
            self._value(attribute)

    def _value(self, attribute: AttributeProto) -> None:
        from onnx import AttributeProto

        match attribute.type:
            case AttributeProto.FLOAT:
                self._bytes(b"f", struct.pack("<f", attribute.f))
            case AttributeProto.FLOATS:
                self._bytes(b"f", struct.pack(f"<{len(attribute.floats)}f", *attribute.floats))
            case AttributeProto.INT:
                self._number(attribute.i)
            case AttributeProto.INTS:
                self._bytes(b"n", struct.pack(f"<{len(attribute.ints)}q", *attribute.ints))
            case AttributeProto.STRING:
                self._text(attribute.s)
            case AttributeProto.STRINGS:
                self._texts(attribute.strings)
            case AttributeProto.TENSOR:
                self._tensor(attribute.t, named=False)
            case AttributeProto.TENSORS:
                for tensor in attribute.tensors:
                    self._tensor(tensor)
            case AttributeProto.GRAPH:
                self._graph(attribute.g)
            case AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    self._graph(graph)
            case AttributeProto.SPARSE_TENSOR:
                self._sparse(attribute.sparse_tensor)
            case _:
                self._bytes(b"a", attribute.SerializeToString(deterministic=True))

    def _sparse(self, sparse: Any) -> None:
        self._bytes(b"n", struct.pack(f"<{len(sparse.dims)}q", *sparse.dims))
        self._tensor(sparse.values)
        self._tensor(sparse.indices)

    def _tensor(self, tensor: TensorProto, *, named: bool = True) -> None:
        from onnx import TensorProto, numpy_helper

        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError(f"{tensor.name}: its values are in another file")
        if named:
            self._text(tensor.name)
        self._number(tensor.data_type)
        self._bytes(b"n", struct.pack(f"<{len(tensor.dims)}q", *tensor.dims))
        if tensor.data_type == TensorProto.STRING:
            self._texts(tensor.string_data)
        elif tensor.HasField("raw_data"):
            self._bytes(b"d", tensor.raw_data)
        else:
            self._bytes(b"d", numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)


def _domain(domain: str) -> str:
    return "" if domain == _STANDARD else domain


def _name(item: Any) -> str:
    return str(item.name)


def _function_key(function: FunctionProto) -> tuple[str, str, str]:
    return function.domain, function.name, function.overload


def _without_empty_ends(names: Sequence[str]) -> list[str]:
    """Optional inputs and outputs at the end may be left out or be empty."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept
