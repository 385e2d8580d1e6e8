"""Conversion of a float16 ONNX model to float32, for CPUs, which have no fast float16 arithmetic.

Every float16 tensor, type and cast in the graph, its subgraphs and its functions becomes float32. The weights keep the
values they have in float16, so results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stepcell.contract import METADATA_KEY, StateSpec, StepContract, TensorSpec
from stepcell.optional_imports import require

if TYPE_CHECKING:
    import onnx

__all__ = ["to_float32"]

_Spec = TypeVar("_Spec", TensorSpec, StateSpec)

# Integer attributes of standard operators whose value is an element type.
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type"})


def to_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` without float16. Its contract says float32 too.

    Args:
        model: with its weights in memory (`onnx.load` reads external data).
    """
    require("onnx", extra="ort", purpose="running a float16 model in float32")
    from onnx import ModelProto

    wide = ModelProto()
    wide.CopyFrom(model)
    _widen_graph(wide.graph)
    for function in wide.functions:
        _widen_values(function.value_info)
        _widen_attributes(function.attribute_proto)
        _widen_nodes(function.node)
    for entry in wide.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = _widen_contract(StepContract.from_json(entry.value)).to_json()
    return wide


def _widen_contract(contract: StepContract) -> StepContract:
    return msgspec.structs.replace(
        contract,
        inputs=_widen_specs(contract.inputs),
        outputs=_widen_specs(contract.outputs),
        states=_widen_specs(contract.states),
        precision="float32",
    )


def _widen_specs(specs: tuple[_Spec, ...]) -> tuple[_Spec, ...]:
    return tuple(msgspec.structs.replace(spec, dtype="float32") if spec.dtype == "float16" else spec for spec in specs)


def _widen_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _widen_tensor(sparse.values)
    for values in (graph.input, graph.output, graph.value_info):
        _widen_values(values)
    _widen_nodes(graph.node)


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        _widen_attributes(node.attribute)


def _widen_attributes(attributes: Iterable[onnx.AttributeProto]) -> None:
    from onnx import AttributeProto, TensorProto

    for attribute in attributes:
        if attribute.type == AttributeProto.INT:
            if attribute.name in _DTYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            continue
        # Fields of the other kinds are empty, so the kind need not be checked.
        for tensor in (attribute.t, *attribute.tensors, attribute.sparse_tensor.values):
            _widen_tensor(tensor)
        for sparse in attribute.sparse_tensors:
            _widen_tensor(sparse.values)
        for kind in (attribute.tp, *attribute.type_protos):
            _widen_type(kind)
        for graph in (attribute.g, *attribute.graphs):
            _widen_graph(graph)


def _widen_values(values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        _widen_type(value.type)


def _widen_type(kind: onnx.TypeProto) -> None:
    from onnx import TensorProto

    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        if tensor.elem_type == TensorProto.FLOAT16:
            tensor.elem_type = TensorProto.FLOAT
    elif which in ("sequence_type", "optional_type"):
        _widen_type(getattr(kind, which).elem_type)
    elif which == "map_type":
        _widen_type(kind.map_type.value_type)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.FLOAT16:
        name, doc = tensor.name, tensor.doc_string
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), name))
        tensor.doc_string = doc
