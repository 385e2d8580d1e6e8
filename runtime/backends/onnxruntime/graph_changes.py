"""What all changes of a graph for a CPU need: whether it may be changed, sizes of its values, and new nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["has_bodies", "replace_nodes", "static_shapes"]


def has_bodies(graph: GraphProto) -> bool:
    """Whether it has branches or loops, whose bodies may read any value by its name."""
    return any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Replace the nodes of a graph, and drop the nodes and weights that are no longer read."""
    used, live = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if used.intersection(node.output):
            live.append(node)
            used.update(node.input)
    read = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(live))
    graph.initializer.extend(read)


def static_shapes(model: ModelProto) -> Mapping[str, tuple[int, ...]]:
    """The shape of every value whose shape is known; 0 is an unknown size."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
