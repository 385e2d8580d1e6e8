"""Dropping casts that change nothing, which ONNX Runtime makes copies of where their result is an output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepcell.optional_imports import require
from stepcell.runtime.backends.onnxruntime.graph_changes import has_bodies, replace_nodes

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["drop_copies"]


def drop_copies(model: ModelProto) -> int:
    """Let nodes write outputs that are a Cast of their result to the type that it has already, in place.

    The op of a cell gives its new state twice, in the type of the state and in that of the arithmetic.

    Args:
        model: without functions.

    Returns:
        The number of casts that were dropped.
    """
    require("onnx", extra="ort", purpose="running a model")
    from onnx import shape_inference

    graph = model.graph
    if has_bodies(graph):
        return 0
    values = shape_inference.infer_shapes(model).graph.value_info  # neither inputs nor outputs
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    outputs = {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        to = next((each.i for each in node.attribute if each.name == "to"), None) if node.op_type == "Cast" else None
        source = node.input[0] if to is not None else ""
        if to is not None and types.get(source) == to and node.output[0] in outputs and source not in renamed:
            renamed[source] = node.output[0]
        else:
            kept.append(node)
    for node in kept if renamed else ():
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    if renamed:
        replace_nodes(graph, kept)
    return len(renamed)
