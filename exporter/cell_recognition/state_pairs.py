"""States of recognised cells: which input of the graph a cell turns into which output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import RecognisedCell
from stepcell.ops import OPS

__all__ = ["CARRYING", "RESHAPING", "CellState", "states_of_cells"]

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
    befores = {after: before for cell in cells for before, after in cell.states}

    def forward(value: ir.Value) -> Iterable[ir.Value]:
        for node, index in value.uses():
            if node.op_type in operators and (index == 0 or node.op_type in _ALL_INPUTS):
                yield from node.outputs

    def backward(value: ir.Value) -> Iterable[ir.Value]:
        if value in befores:
            yield befores[value]
        node = value.producer()
        if node is not None and node.op_type in operators:
            sources = node.inputs if node.op_type in _ALL_INPUTS else node.inputs[:1]
            yield from (source for source in sources if source is not None)

    found = []
    for cell in cells:
        for role, (before, after) in zip(OPS[cell.op].states, cell.states, strict=True):
            targets = [value for value in _walk(after, forward) if value in model.graph.outputs]
            sources = [value for value in _walk(before, backward) if value in model.graph.inputs]
            found += [CellState(cell.name, role, str(s.name), str(t.name)) for s in sources for t in targets]
    return found


def _walk(start: ir.Value, neighbours: Callable[[ir.Value], Iterable[ir.Value]]) -> list[ir.Value]:
    seen, queue = {start: None}, [start]
    while queue:
        for value in neighbours(queue.pop()):
            if value not in seen:
                seen[value] = None
                queue.append(value)
    return list(seen)
