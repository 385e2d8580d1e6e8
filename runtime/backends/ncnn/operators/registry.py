"""Registry: for each ONNX operator how it is written as layers of ncnn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.runtime.backends.ncnn.graph import Graph, NotConvertible

__all__ = ["ANY_TYPE", "WRITERS", "Node", "writes"]


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        inputs: names of tensors; "" for one that is absent.
        attributes: numbers, bytes and lists of them.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute, or `default`; text as str."""
        value = self.attributes.get(attribute, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def input(self, number: int) -> str:
        """Name of an input; "" where it is absent."""
        return self.inputs[number] if number < len(self.inputs) else ""

    def weights(self, graph: Graph, number: int) -> NDArray[Any]:
        """An input that must be known.

        Raises:
            NotConvertible: it is computed in the graph, or absent.
        """
        array = graph.constant(self.input(number))
        if array is None:
            raise NotConvertible(f"{self}: its input {number} is computed in the graph")
        return array

    def integers(self, graph: Graph, attribute: str, number: int) -> list[int] | None:
        """Integers that older operator sets have as an attribute and newer ones as an input; None: absent."""
        if self.input(number):
            return [int(value) for value in np.ravel(self.weights(graph, number))]
        found = self.attributes.get(attribute)
        return None if found is None else [int(value) for value in np.ravel(found)]

    def __str__(self) -> str:
        return f"{self.op} ({self.outputs[0]})"


Writer = Callable[[Node, Graph], None]
WRITERS: dict[str, Writer] = {}
ANY_TYPE: set[str] = set()  # operators that move elements, and so compute the same for integers in float32


def writes(*names: str, moves: bool = False) -> Callable[[Writer], Writer]:
    """Enter the decorated function for these operators; `moves`: they move elements and compute nothing."""

    def enter(writer: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(names, writer))
        if moves:
            ANY_TYPE.update(names)
        return writer

    return enter


def axis_of(node: Node, axis: int, rank: int) -> int:
    """An axis of a tensor of `rank` axes as ncnn counts it, without the first one.

    Raises:
        NotConvertible: it is the first axis.
    """
    found = axis + rank if axis < 0 else axis
    if not 1 <= found < rank:
        raise NotConvertible(f"{node}: works along the first axis, which counts streams")
    return found - 1
