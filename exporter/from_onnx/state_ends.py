"""Ends of a state that differ in form: the file is changed so that input and output have one shape.

Exporters leave a state with an axis of size 1 more on one side, and first states of one element that are broadcast
(Robust Video Matting) are sometimes declared with that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from stepcell.exporter.from_onnx.onnx_file import OnnxFile, Port
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.step_onnx.graph import set_shape

__all__ = ["with_equal_ends"]


def with_equal_ends(file: OnnxFile, pairs: Sequence[Pair]) -> tuple[OnnxFile, list[str]]:
    """The file with the output of every state in the shape of its input, and what was changed, in words."""
    inputs, outputs = ({port.name: port for port in ports} for ports in (file.inputs, file.outputs))
    different = [(inputs[p.input], outputs[p.output]) for p in pairs if not inputs[p.input].fits(outputs[p.output])]
    if not different:
        return file, []
    model = onnx.ModelProto.FromString(file.data)
    notes = []
    for before, after in different:
        if before.has_elements:
            _reshape(model.graph, after, before)
            outputs[after.name] = replace(after, shape=before.shape)
            notes.append(f"{after.name} {_text(after)} is reshaped to {_text(before)}, as {before.name} has it")
        else:
            (value,) = (value for value in model.graph.input if value.name == before.name)
            set_shape(value, after.shape or ())
            inputs[before.name] = replace(before, shape=after.shape)
            notes.append(
                f"{before.name} is declared {_text(before)}, and its next value is larger: it starts at that size"
            )
    changed = replace(
        file,
        data=model.SerializeToString(),
        model=model,
        inputs=list(inputs.values()),
        outputs=list(outputs.values()),
    )
    return changed, notes


def _reshape(graph: onnx.GraphProto, after: Port, before: Port) -> None:
    """Add a Reshape behind an output, which keeps its name."""
    returned = f"{after.name}/returned"
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [returned if name == after.name else name for name in names]
    shape = [size if isinstance(size, int) else -1 for size in before.shape or ()]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), f"{after.name}/shape"))
    graph.node.append(onnx.helper.make_node("Reshape", [returned, f"{after.name}/shape"], [after.name]))
    (value,) = (value for value in graph.output if value.name == after.name)
    set_shape(value, before.shape or ())


def _text(port: Port) -> str:
    return " x ".join("?" if size is None else str(size) for size in port.shape or ()) or "1"
