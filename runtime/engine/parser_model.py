"""The model as TensorRT's parser gets it: what the parser would misread is rewritten, or refused.

Of a function the parser (TensorRT-RTX 1.7.1) takes the bare name: one that is called like a standard operator is parsed
as that operator, and of two with one name in two domains the first serves both. It ignores `layout` of recurrent nodes
and computes float64 in float32. It says nothing about either.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from stepcell.errors import BuildError
from stepcell.library_errors import library_errors
from stepcell.onnx_model import OnnxFile
from stepcell.onnx_rewrite import inline_foreign, sort_nodes, use_time_first
from stepcell.ops import DOMAIN

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["for_parser", "node_label"]

logger = logging.getLogger(__name__)

_DOUBLE = 11  # onnx.TensorProto.DOUBLE
# Operators that move values or convert them, and compute nothing with them.
_MOVING = frozenset(
    {
        *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather"),
        *("GatherElements", "GatherND", "Identity", "Reshape", "Shape", "Size", "Slice", "SpaceToDepth", "Split"),
        *("Squeeze", "Tile", "Transpose", "Unsqueeze", "Where", "If", "Loop", "Scan"),
    }
)


def for_parser(file: OnnxFile) -> OnnxFile:
    """The file with functions of other programs inlined, nodes in order and recurrent nodes in the default layout.

    What was rewritten is logged. Functions of the ops stay: their names are those of no standard operator.

    Raises:
        BuildError: a node that computes in float64, a function that calls itself, or too many nodes.
    """
    foreign = sorted({f"{f.domain}::{f.name}" for f in file.model.functions if f.domain != DOMAIN})
    model = type(file.model)()
    model.CopyFrom(inline_foreign(file.model))
    unsorted = sort_nodes(model)
    recurrent = use_time_first(model)
    _refuse_float64(model, file)
    repeated = _name_apart(model.graph.node)
    if foreign:
        logger.info(f"graph:   functions inlined, which TensorRT would look up by bare name: {', '.join(foreign)}")
    if recurrent:
        logger.info(f"graph:   layout=1, which TensorRT ignores, rewritten with transposes: {', '.join(recurrent)}")
    if not (foreign or unsorted or recurrent or repeated):
        return file
    return replace(file, model=model, data=model.SerializeToString())


def node_label(node: NodeProto) -> str:
    """The name of a node; one without a name is called after its output, as TensorRT does."""
    return node.name or "node_of_" + next(filter(None, node.output), "")


def _name_apart(nodes: Iterable[NodeProto]) -> bool:
    """Give nodes of one name different ones, so that the layers of each can be told apart."""
    nodes = list(nodes)
    count = Counter(map(node_label, nodes))
    repeated = [node for node in nodes if count[node_label(node)] > 1]
    for number, node in enumerate(repeated):
        node.name = f"{node_label(node)}_{number}"
    return bool(repeated)


def _refuse_float64(model: ModelProto, file: OnnxFile) -> None:
    doubles = {f"{spec.name}" for spec in (*file.contract.inputs, *file.contract.outputs) if spec.dtype == "float64"}
    doubles |= {state.input for state in file.contract.states if state.dtype == "float64"}
    if doubles:
        raise BuildError(
            f"{file.path}: {min(doubles)} is float64; TensorRT has no float64 and would make it float32 without a word",
            hint="convert the model to float32, or run the .onnx file, which ONNX Runtime computes in float64",
        )
    from onnx import shape_inference

    with library_errors(str(file.path), BuildError, what="its types cannot be inferred"):
        graph = shape_inference.infer_shapes(model).graph if _mentions_float64(model) else None
    for node, types in _nodes_with_types(graph) if graph is not None else ():
        names = [name for name in (*node.input, *node.output) if types.get(name) == _DOUBLE]
        if names and (node.domain not in ("", "ai.onnx") or node.op_type not in _MOVING):
            raise BuildError(
                f"{file.path}: node {node_label(node)!r}, operator {node.op_type}: computes {names[0]!r} in float64; "
                "TensorRT has no float64 and would compute it in float32 without a word",
                hint="convert this part of the model to float32, or run the .onnx file, which ONNX Runtime computes in "
                "float64",
            )


def _mentions_float64(model: ModelProto) -> bool:
    """Whether a constant, a type or an attribute of the model may be float64; most models need no inference."""
    from stepcell.external_weights import tensors_of

    return (
        any(tensor.data_type == _DOUBLE for tensor in tensors_of(model))
        or any(value.type.tensor_type.elem_type == _DOUBLE for value in (*model.graph.input, *model.graph.value_info))
        or any(attribute.i == _DOUBLE for node in _every_node(model) for attribute in node.attribute)
    )


def _every_node(model: ModelProto) -> Iterator[NodeProto]:
    def walk(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
        for node in nodes:
            yield node
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from walk(graph.node)

    yield from walk(model.graph.node)
    for function in model.functions:
        yield from walk(function.node)


def _nodes_with_types(
    graph: GraphProto, outer: dict[str, int] | None = None
) -> Iterator[tuple[NodeProto, dict[str, int]]]:
    """Nodes of a graph and of graphs inside it, with the element types of the tensors that they can name."""
    types = dict(outer or {})
    types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes_with_types(inner, types)
        yield node, types
