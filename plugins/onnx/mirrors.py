"""Fp16 mirrors of float32 states in an ONNX graph: which tensor is the mirror of which state.

A cell whose h is an input of the model gets its mirror as another input; a cell whose h is another cell's h_next
reads that cell's y.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stepcell.contract import StateSpec
from stepcell.plugins.fp16_mirrors import Fp16Mirror

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["add_fp16_mirrors", "all_nodes"]

_HALF = 10  # onnx.TensorProto.DataType
_IN, _OUT = "half_in.", "half_out."


def add_fp16_mirrors(
    onnx: Any, graph: GraphProto, cells: Sequence[NodeProto], states: Iterable[StateSpec]
) -> tuple[dict[str, str], tuple[Fp16Mirror, ...]]:
    """Find, or add to the graph, the fp16 mirror of every h that these cells read.

    Args:
        onnx: the module.
        graph: gets an input and an output for every state that one cell reads and one cell writes, both directly.
        cells: nodes of the ops with a float32 state.
        states: states of the contract.

    Returns:
        The name of the mirror by name of the float32 tensor, and the input/output pairs that were added.
    """
    halves = {node.output[0]: node.output[-1] for node in cells if node.output[-1]}
    inputs, outputs = ({port.name: port for port in ports} for ports in (graph.input, graph.output))
    read = {node.input[1] for node in cells} & inputs.keys()
    written = halves.keys() & outputs.keys()
    mirrors = []
    for state in states:
        if state.input not in read or state.output not in written or state.batch_axis != 0:
            continue
        mirror = Fp16Mirror(state.name, _IN + state.name, _OUT + state.name)
        for ports, name, like in (
            (graph.input, mirror.input, inputs[state.input]),
            (graph.output, mirror.output, outputs[state.output]),
        ):
            port = ports.add()
            port.CopyFrom(like)
            port.name, port.type.tensor_type.elem_type = name, _HALF
        y = halves[state.output]
        # The kernel must write the mirror itself: the next step relies on zeros in its padding channels.
        _rename(graph, y, mirror.output)
        if y in outputs:
            graph.node.append(onnx.helper.make_node("Identity", [mirror.output], [y]))
        halves[state.output] = mirror.output
        halves[state.input] = mirror.input
        mirrors.append(mirror)
    return halves, tuple(mirrors)


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Iterate over nodes and the nodes of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """Rename a tensor at its producer and at all consumers."""
    for node in all_nodes(graph.node):
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
