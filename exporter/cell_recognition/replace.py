"""Replacement of recognised cells by op nodes.

The new state of a cell leaves its op in the dtype of the old state. Where a graph computes in
float16 and converts its states on entry and exit, these conversions are bypassed, so that a float32
state is never rounded to float16 between two steps, nor between two cells that share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir.passes.common as common
from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import RecognisedCell
from stepcell.exporter.cell_recognition.values import Array
from stepcell.ops import DOMAIN, OPS, VERSION, same_pads

__all__ = ["replace_cells"]


def replace_cells(model: ir.Model, cells: Sequence[RecognisedCell]) -> None:
    """Replace cells that `find_cells` found in this model, in place.

    Outputs of the graph keep their names. Nodes of a cell that something else reads stay; all
    others are removed. The definitions of the ops are not added (`step_onnx.graph.attach_functions`).
    """
    graph = model.graph
    replacer = _Replacer(
        graph,
        {value.name for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None},
    )
    for cell in cells:
        replacer.replace(cell)
    if cells:
        model.opset_imports[DOMAIN] = VERSION
    graph.sort()  # an LSTM's output gate may be computed after its new c
    common.RemoveUnusedNodesPass()(model)


@dataclass
class _Replacer:
    """One graph in which cells are replaced one after the other.

    Attributes:
        taken: names of values in use.
        states: by the value of a replaced cell's new state, that state in the dtype of the old one.
        values: by the same, the value that everything else reads.
    """

    graph: ir.Graph
    taken: set[str | None]
    states: dict[ir.Value, ir.Value] = field(default_factory=dict)
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _axes: ir.Value | None = None

    def replace(self, cell: RecognisedCell) -> None:
        scope = cell.name.replace(".", "/")
        last = cell.states[-1][1].producer()
        assert last is not None

        def insert(op: str, inputs: Sequence[ir.Value], like: ir.Value, **attributes: int) -> ir.Value:
            """Insert a node before the last one of the cell; its result has the dtype of `like`."""
            result = ir.Value(name=self._unused(f"{scope}/{op}"), type=like.type)
            self.graph.insert_before(last, ir.node(op, inputs, attributes, outputs=[result], name=result.name))
            return result

        befores = [self.states.get(old, old) for old, _ in cell.states]
        inputs = [self.values.get(source, source) for source in cell.x]
        x = inputs[0] if len(inputs) == 1 else insert("Concat", inputs, inputs[0], axis=1)
        weights = [
            self._constant(f"{cell.name}.{weight.name}", array)
            for weight, array in zip(OPS[cell.op].weights, cell.weights, strict=False)
        ]
        given = [x, *befores]
        if cell.is_dense:  # features are maps of one pixel
            given = [insert("Unsqueeze", [value, self._pixel_axes()], value) for value in given]
        attributes: dict[str, str | list[int]] = {"pads": same_pads(cell.kernel), "gates": cell.gates}
        if cell.reset is not None:
            attributes["reset"] = cell.reset
        results = [
            ir.Value(name=self._unused(f"{scope}/{port}"), type=value.type)
            for port, value in zip(OPS[cell.op].outputs, [*befores, x], strict=True)
        ]
        name = f"{scope}/{cell.op}"
        self.graph.insert_before(
            last, ir.node(cell.op, [*given, *weights], attributes, domain=DOMAIN, outputs=results, name=name)
        )
        if cell.is_dense:
            results = [insert("Squeeze", [value, self._pixel_axes()], value) for value in results]
        *states, y = results
        for index, ((_, new), state) in enumerate(zip(cell.states, states, strict=True)):
            state.shape = new.shape
            narrow = state
            if new.dtype != state.dtype:
                narrow = y if index == 0 else insert("Cast", [state], new, to=int(new.dtype or 0))
                narrow.shape = new.shape
                for cast in [n for n in new.consumers() if n.op_type == "Cast" and n.outputs[0].dtype == state.dtype]:
                    self._substitute(cast.outputs[0], state)
            self._substitute(new, narrow)
            self.states[new], self.values[new] = state, narrow

    def _substitute(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything read `new`, which takes the name of `old` where that is an output of the graph."""
        outputs = self.graph.outputs
        if old in outputs:
            if new in outputs:  # one value cannot have two names
                copy = ir.node("Identity", [new], outputs=[ir.Value(type=new.type, shape=new.shape)])
                self.graph.append(copy)
                new = copy.outputs[0]
            new.name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def _constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=self._unused(name))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _pixel_axes(self) -> ir.Value:
        if self._axes is None:
            self._axes = self._constant("pixel_axes", np.array([2, 3]))
        return self._axes

    def _unused(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name
