"""States of recurrent cells: which input of the graph a cell turns into which output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import RecognisedCell
from stepcell.ops import OPS

__all__ = ["CARRYING", "RESHAPING", "Carriers", "CellState", "states_of_cells"]

# Operators that pass a state on as it is, in another form, or stacked with others ...
RESHAPING = frozenset(
    {
        *("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
        *("Slice", "Gather", "Split", "Concat"),
    }
)
# ... and masked or broadcast.
CARRYING = RESHAPING | {"Expand", "Dropout", "Mul", "Where"}
_ALL_INPUTS = {"Concat", "Mul", "Where"}  # of the others only the first input is the state


@dataclass(frozen=True)
class CellState:
    """One state of a cell: its name in the op ("h" or "c"), and the graph's input and output that carry it."""

    cell: str
    role: str
    input: str
    output: str


def states_of_cells(model: ir.Model, cells: Sequence[RecognisedCell], operators: frozenset[str]) -> list[CellState]:
    """Inputs that reach a cell as its old state, with outputs that its new state reaches, in order of the cells.

    Cells may be chained on one state: the second takes the new state of the first.

    Args:
        model: the graph before its cells are replaced.
        operators: those that may be on the way.
    """
    carriers = Carriers(model.graph, {after: before for cell in cells for before, after in cell.states}, operators)
    return [
        CellState(cell.name, role, str(source.name), str(target.name))
        for cell in cells
        for role, (before, after) in zip(OPS[cell.op].states, cell.states, strict=True)
        for source in carriers.inputs_of(before)
        for target in carriers.outputs_of(after)
    ]


class Carriers:
    """Walks from the old state of a cell back to the graph's inputs, and from the new one on to its outputs.

    The two branches of an If are entered and left.

    Args:
        befores: by the new state of every cell the old one, from which the walk goes on in a chain of cells.
        operators: those that may be on the way.
    """

    def __init__(
        self, graph: ir.Graph, befores: Mapping[ir.Value, ir.Value], operators: frozenset[str] = CARRYING
    ) -> None:
        self._graph, self._befores, self._operators = graph, befores, operators
        self._leaves: dict[ir.Value, list[ir.Value]] = {}  # a result of a branch -> that of its If
        self._enters: dict[ir.Value, list[ir.Value]] = {}
        for node in ir.traversal.RecursiveGraphIterator(graph):
            branches = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            for branch in branches if node.op_type == "If" else ():
                for inner, outer in zip(branch.outputs, node.outputs, strict=True):
                    self._leaves.setdefault(inner, []).append(outer)
                    self._enters.setdefault(outer, []).append(inner)

    def inputs_of(self, before: ir.Value) -> list[ir.Value]:
        """The graph's inputs that reach a value."""
        return [value for value in _walk(before, self._backward) if value in self._graph.inputs]

    def outputs_of(self, after: ir.Value) -> list[ir.Value]:
        """The graph's outputs that a value reaches."""
        return [value for value in _walk(after, self._forward) if value in self._graph.outputs]

    def _forward(self, value: ir.Value) -> Iterable[ir.Value]:
        yield from self._leaves.get(value, ())
        for node, index in value.uses():
            if node.op_type in self._operators and (index == 0 or node.op_type in _ALL_INPUTS):
                yield from node.outputs

    def _backward(self, value: ir.Value) -> Iterable[ir.Value]:
        yield from self._enters.get(value, ())
        if value in self._befores:
            yield self._befores[value]
        node = value.producer()
        if node is not None and node.op_type in self._operators:
            sources = node.inputs if node.op_type in _ALL_INPUTS else node.inputs[:1]
            yield from (source for source in sources if source is not None)


def _walk(start: ir.Value, neighbours: Callable[[ir.Value], Iterable[ir.Value]]) -> list[ir.Value]:
    seen, queue = {start: None}, [start]
    while queue:
        for value in neighbours(queue.pop()):
            if value not in seen:
                seen[value] = None
                queue.append(value)
    return list(seen)
