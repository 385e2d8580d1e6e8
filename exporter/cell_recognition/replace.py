"""Put an op in the place of every cell."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir.passes.common as common
from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import Cell
from stepcell.ops import CONV_GRU, DOMAIN, OPS, VERSION, same_pads

__all__ = ["replace_cells"]


def replace_cells(model: ir.Model, cells: Sequence[Cell]) -> None:
    """Replace cells that `find_cells` found in this model, in place.

    Outputs of the graph keep their names. Nodes of a cell that something else still reads stay;
    all others go. The definitions of the ops are not added here (exporter.graph.attach_functions).
    """
    graph = model.graph
    replaced: dict[ir.Value, ir.Value] = {}  # a later cell may read the new state of an earlier one
    taken = {value.name for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None}
    for cell in cells:
        _replace(graph, cell, replaced, taken)
    if cells:
        model.opset_imports[DOMAIN] = VERSION
    graph.sort()  # an LSTM's output gate may be computed after its new c
    common.RemoveUnusedNodesPass()(model)


def _replace(graph: ir.Graph, cell: Cell, replaced: dict[ir.Value, ir.Value], taken: set[str | None]) -> None:
    def unused(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    scope = cell.name.replace(".", "/")
    before = [replaced.get(old, old) for old, _ in cell.states]
    inputs = [replaced.get(source, source) for source in cell.x]
    last = cell.states[-1][1].producer()
    assert last is not None
    x = inputs[0]
    if len(inputs) > 1:
        joined = ir.Value(name=unused(f"{scope}/x"), type=x.type)
        graph.insert_before(last, ir.node("Concat", inputs, {"axis": 1}, outputs=[joined], name=f"{scope}/Concat"))
        x = joined
    weights = []
    op = OPS[cell.op]
    for kind, array in zip(op.weights, cell.weights, strict=False):
        tensor = ir.tensor(array, name=unused(f"{cell.name}.{kind.name}"))
        weight = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(weight)
        weights.append(weight)
    attributes: dict[str, str | list[int]] = {"pads": same_pads(cell.kernel), "gates": "soft"}
    if op is CONV_GRU:
        attributes["reset"] = "before"
    results = [ir.Value(name=unused(f"{scope}/{port}")) for port in op.outputs]
    node = ir.node(
        cell.op, [x, *before, *weights], attributes, domain=DOMAIN, outputs=results, name=f"{scope}/{cell.op}"
    )
    graph.insert_before(last, node)
    for index, (old, new) in enumerate(cell.states):
        # h' in the dtype of the input, where it differs from the state's, is the op's y
        result = results[-1] if index == 0 and new.dtype != old.dtype else results[index]
        result.type, result.shape = new.type, new.shape
        ir.convenience.replace_all_uses_with(new, result, replace_graph_outputs=True)
        result.name = new.name
        replaced[new] = result
