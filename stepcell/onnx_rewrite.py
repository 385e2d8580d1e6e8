"""Rewrites of an ONNX model that leave its results as they are, for readers that would misread it.

Nodes in the order in which they are computed, functions of other programs inlined, recurrent nodes with time as their
first axis.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, MutableSequence
from typing import TYPE_CHECKING

from stepcell.errors import InputError
from stepcell.model_size import check_model_nodes
from stepcell.ops import DOMAIN
from stepcell.optional_imports import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["inline_foreign", "sort_nodes", "use_time_first"]

_RECURRENT = ("GRU", "LSTM", "RNN")
_SWAP = (1, 0, 2)  # the first two axes


def inline_foreign(model: ModelProto, *, keep: str = DOMAIN) -> ModelProto:
    """The model without model-local functions of other domains than `keep`; the model itself if it has none.

    Raises:
        InputError: a function that calls itself, or more nodes than the limit, with what they are.
    """
    onnx = require("onnx", extra="rtx", purpose="building an engine")
    from onnx import inliner

    foreign = [function for function in model.functions if function.domain != keep]
    if not foreign:
        return model
    check_model_nodes(model, "the graph")
    kept = [(function.domain, function.name) for function in model.functions if function.domain == keep]
    try:
        inlined: ModelProto = inliner.inline_selected_functions(model, kept, exclude=True)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        name = f"{foreign[0].domain}::{foreign[0].name}"
        raise InputError(f"function {name} cannot be inlined: {' '.join(str(error).split())}") from error
    return inlined


def sort_nodes(model: ModelProto) -> bool:
    """Bring nodes into an order in which each comes after those it reads, in graphs inside nodes too, in place.

    A node moves only as far as it must; a graph with a circle is left as it is.

    Returns:
        Whether any node moved.
    """
    moved = _sort_graph(model.graph)
    for function in model.functions:
        moved |= _sort(function.node)
    return moved


def _sort_graph(graph: GraphProto) -> bool:
    return _sort(graph.node)


def _sort(nodes: MutableSequence[NodeProto]) -> bool:
    moved = False
    for node in nodes:
        for inner in _graphs_of(node):
            moved |= _sort_graph(inner)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    readers: dict[int, list[int]] = {}
    waiting = []
    for index, node in enumerate(nodes):
        sources = {makers[name] for name in _reads(node) if name in makers} - {index}
        waiting.append(len(sources))
        for source in sources:
            readers.setdefault(source, []).append(index)
    ready = [index for index, count in enumerate(waiting) if not count]
    order = []
    while ready:
        order.append(index := heapq.heappop(ready))
        for reader in readers.get(index, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes) or order == sorted(order):
        return moved
    copies = [type(nodes[0]).FromString(nodes[index].SerializeToString()) for index in order]
    del nodes[:]
    nodes.extend(copies)
    return True


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, by graphs inside it too."""
    yield from filter(None, node.input)
    for graph in _graphs_of(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (output.name for output in graph.output)


def _graphs_of(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def use_time_first(model: ModelProto) -> list[str]:
    """Give GRU, LSTM and RNN nodes the default layout, in place: ONNX Runtime refuses layout=1, TensorRT ignores it.

    The axes of inputs and outputs are swapped by Transpose nodes, which is exact.

    Returns:
        Names of the nodes that were rewritten.
    """
    taken = _names(model.graph.node)
    found = _rewrite(model.graph.node, taken)
    for function in model.functions:
        found += _rewrite(function.node, taken | _names(function.node))
    return found


def _names(nodes: Iterable[NodeProto]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        found |= {node.name, *node.input, *node.output}
        for graph in _graphs_of(node):
            found |= _names(graph.node)
    return found


def _rewrite(nodes: MutableSequence[NodeProto], taken: set[str]) -> list[str]:
    found = []
    for node in nodes:
        for graph in _graphs_of(node):
            found += _rewrite(graph.node, taken)
    position = 0
    while position < len(nodes):
        node = nodes[position]
        layout = next((attribute for attribute in node.attribute if attribute.name == "layout"), None)
        if node.op_type in _RECURRENT and node.domain in ("", "ai.onnx") and layout is not None and layout.i == 1:
            found.append(node.name or node.output[0])
            before, after = _swapped(node, taken)
            for offset, each in enumerate(before):
                nodes.insert(position + offset, each)
            position += len(before)
            for offset, each in enumerate(after):
                nodes.insert(position + 1 + offset, each)
            position += len(after)
        position += 1
    return found


def _swapped(node: NodeProto, taken: set[str]) -> tuple[list[NodeProto], list[NodeProto]]:
    """Transposes before and after a node, which is changed to the default layout."""
    from onnx import helper

    kept = [attribute for attribute in node.attribute if attribute.name != "layout"]
    del node.attribute[:]
    node.attribute.extend(kept)

    def fresh(stem: str) -> str:
        name, number = stem, 1
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        return name

    label = node.name or node.output[0] or node.op_type
    before, after = [], []
    for index in (0, 5, 6):  # x, initial_h, initial_c
        if index < len(node.input) and node.input[index]:
            name = fresh(f"{node.input[index]}/time_first")
            before.append(
                helper.make_node("Transpose", [node.input[index]], [name], fresh(f"{label}/Transpose"), perm=_SWAP)
            )
            node.input[index] = name
    for index, output in enumerate(node.output):  # y, y_h, y_c
        if output:
            name = fresh(f"{output}/time_first")
            perm = (2, 0, 1, 3) if index == 0 else _SWAP
            after.append(helper.make_node("Transpose", [name], [output], fresh(f"{label}/Transpose"), perm=perm))
            node.output[index] = name
    return before, after
