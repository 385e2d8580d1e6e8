"""The size of an ONNX model as a library works on it: nodes with all functions inlined, bytes with external weights.

Functions may call functions, so a few hundred bytes can stand for any number of nodes, which TensorRT, ONNX Runtime and
every walk over the graph would visit one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.errors import InputError
from stepcell.limits import MODEL_BYTES, NESTING, NODES

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["check_model_bytes", "check_model_nodes", "inlined_nodes"]

_Function = tuple[str, str, str]  # domain, name, overload


def check_model_bytes(size: int, path: Path) -> None:
    """Refuse a file, or a file with its external weights, that is larger than the limit `MODEL_BYTES`."""
    MODEL_BYTES.check(size, str(path), "the model with its weights")


def check_model_nodes(model: ModelProto, subject: object) -> None:
    """Refuse a model with more nodes than the limit `NODES`, or with functions that call themselves or too many others.

    Raises:
        InputError: with the figure and the limit.
    """
    NODES.check(inlined_nodes(model, str(subject)), str(subject), "with its functions inlined")


def inlined_nodes(model: ModelProto, subject: str) -> int:
    """Number of nodes of a model, in graphs inside nodes too, with every call of a function replaced by its body.

    Each body is visited once, whatever the result.

    Raises:
        InputError: a function calls itself, or is nested deeper than the limit `NESTING`.
    """
    bodies = {(each.domain, each.name, each.overload): each.node for each in model.functions}
    counts: dict[_Function, int] = {}
    calling: list[_Function] = []

    def count(nodes: Iterable[NodeProto]) -> int:
        total = 0
        for node in nodes:
            for attribute in node.attribute:
                total += sum(count(graph.node) for graph in (attribute.g, *attribute.graphs))
            key = (node.domain, node.op_type, node.overload)
            total += called(key) if key in bodies else 1
        return total

    def called(key: _Function) -> int:
        if key not in counts:
            if key in calling:
                raise InputError(f"{subject}: function {key[0]}::{key[1]} calls itself")
            NESTING.check(len(calling) + 1, subject, f"calls of functions inside functions, such as {key[0]}::{key[1]}")
            calling.append(key)
            counts[key] = count(bodies[key])
            calling.pop()
        return counts[key]

    for key in bodies:  # also those that nothing calls: libraries check them
        called(key)
    return count(model.graph.node)
