"""What the recurrent cells of a graph say about its states: which input they turn into which output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import Cell

__all__ = ["pairs_by_cell"]

# Operators that hand a state on: as it is, in another form, masked, or packed with others.
_CARRIERS = {
    *("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Transpose", "Dropout"),
    *("Slice", "Gather", "Split", "Concat", "Mul", "Where"),
}
_ALL_INPUTS = {"Concat", "Mul", "Where"}  # of the others only the first input is the state


def pairs_by_cell(model: ir.Model, cells: Sequence[Cell]) -> dict[str, list[str]]:
    """By name of an input, the outputs that cells turn it into.

    Cells may be chained on one state: the second takes what the first returns.
    """
    befores = {id(after): before for cell in cells for before, after in cell.states}
    found: dict[str, list[str]] = {}
    for cell in cells:
        for before, after in cell.states:
            targets = [value for value in _walk(after, _forward) if value in model.graph.outputs]
            for source in _walk(before, lambda value: _backward(value, befores)):
                if source in model.graph.inputs:
                    known = found.setdefault(str(source.name), [])
                    known += [str(t.name) for t in targets if t.name not in known]
    return found


def _walk(start: ir.Value, neighbours: Callable[[ir.Value], Iterable[ir.Value]]) -> list[ir.Value]:
    seen, queue = {id(start): start}, [start]
    while queue:
        for value in neighbours(queue.pop()):
            if id(value) not in seen:
                seen[id(value)] = value
                queue.append(value)
    return list(seen.values())


def _forward(value: ir.Value) -> Iterable[ir.Value]:
    for node, index in value.uses():
        if node.op_type in _CARRIERS and (index == 0 or node.op_type in _ALL_INPUTS):
            yield from node.outputs


def _backward(value: ir.Value, befores: dict[int, ir.Value]) -> Iterable[ir.Value]:
    if id(value) in befores:
        yield befores[id(value)]
    node = value.producer()
    if node is not None and node.op_type in _CARRIERS:
        sources = node.inputs if node.op_type in _ALL_INPUTS else node.inputs[:1]
        yield from (source for source in sources if source is not None)
