"""Small graphs written as text, and a comparison of a graph before and after cells are replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from numpy.typing import NDArray
from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import NearMiss, RecognisedCell
from stepcell.exporter.cell_recognition.find import find_cells
from stepcell.exporter.cell_recognition.normalise import normalise
from stepcell.exporter.cell_recognition.replace import replace_cells
from stepcell.exporter.step_onnx.op_functions import DOMAIN, function_for, variant_of

Array = NDArray[Any]
Pairs = dict[str, str]


# Parts of graphs: a ConvGRU is GATES, CANDIDATE and BLEND.
X, C, H, W = 3, 4, 6, 7
HEADER = f"(float[1,{X},{H},{W}] x, float[1,{C},{H},{W}] h) => (float[1,{C},{H},{W}] t)"
LSTM_HEADER = (
    f"(float[1,{X},{H},{W}] x, float[1,{C},{H},{W}] h, float[1,{C},{H},{W}] c)"
    f" => (float[1,{C},{H},{W}] t, float[1,{C},{H},{W}] u)"
)
ONE = np.float32(1)
SAME = "<pads = [1, 1, 1, 1]>"
GATES = """
  xh = Concat <axis = 1> (x, h)
  a_z = Conv <pads = [1, 1, 1, 1]> (xh, W_z, b_z)
  a_r = Conv <pads = [1, 1, 1, 1]> (xh, W_r, b_r)
  z = Sigmoid (a_z)
  r = Sigmoid (a_r)
"""
CANDIDATE = """
  rh = Mul (r, h)
  xrh = Concat <axis = 1> (x, rh)
  a_n = Conv <pads = [1, 1, 1, 1]> (xrh, W_n, b_n)
  n = Tanh (a_n)
"""
BLEND = "keep = Sub (one, z)\n old = Mul (keep, h)\n new = Mul (z, n)\n t = Add (old, new)"
WEIGHTS = dict.fromkeys(("W_z", "W_r", "W_n"), (C, X + C, 3, 3)) | dict.fromkeys(("b_z", "b_r", "b_n"), (C,))
LSTM_END = """
  i = Sigmoid (a_i)
  f = Sigmoid (a_f)
  o = Sigmoid (a_o)
  g = Tanh (a_g)
  kept = Mul (f, c)
  added = Mul (g, i)
  u = Add (added, kept)
  squashed = Tanh (u)
  t = Mul (squashed, o)
"""


def graph(text: str, opset: int = 20, **weights: tuple[int, ...] | Array) -> onnx.ModelProto:
    """A model of a graph in ONNX's text form; weights are given as arrays, or as shapes to fill at random."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]> g {text}')
    random = np.random.default_rng(7)
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            weight = (0.3 * random.standard_normal(weight)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.checker.check_model(model)
    return model


def fused(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[RecognisedCell], list[NearMiss]]:
    """The model with every cell replaced and the ops defined, what was found and what was left alone."""
    copy = ir.from_proto(model)
    normalise(copy)
    cells, misses = find_cells(copy)
    replace_cells(copy, cells)
    result = ir.to_proto(copy)
    opset = next(item.version for item in result.opset_import if item.domain == "")
    for variant in {variant_of(node) for node in result.graph.node if node.domain == DOMAIN}:
        result.functions.append(function_for(variant, opset))
    onnx.checker.check_model(result)
    assert [v.name for v in result.graph.input] == [v.name for v in model.graph.input]
    assert [v.name for v in result.graph.output] == [v.name for v in model.graph.output]
    return result, cells, misses


def run(model: onnx.ModelProto, frames: list[dict[str, Array]], states: dict[str, Array], pairs: Pairs) -> list[Any]:
    """Every output at every step, with the states fed back."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    steps = []
    for frame in frames:
        outputs = dict(zip(names, session.run(None, {**frame, **states}), strict=True))
        states = {before: outputs[after] for before, after in pairs.items()}
        steps.append(outputs)
    return steps


def worst_difference(got: list[dict[str, Array]], expected: list[dict[str, Array]]) -> tuple[float, str]:
    """The largest difference of all steps and outputs, and where it is."""
    return max(
        (float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()), f"{name} at step {step}")
        for step, (a, b) in enumerate(zip(got, expected, strict=True))
        for name in b
    )


def check(
    model: onnx.ModelProto, pairs: dict[str, str], tolerance: float = 1e-5
) -> tuple[list[RecognisedCell], list[NearMiss], onnx.ModelProto]:
    """Compare the model before and after over 12 steps."""
    after, cells, misses = fused(model)
    random = np.random.default_rng(1)
    types = {v.name: v.type.tensor_type for v in model.graph.input}
    shapes = {name: [d.dim_value or 5 for d in t.shape.dim] for name, t in types.items()}
    numpy_types = {name: onnx.helper.tensor_dtype_to_np_dtype(t.elem_type) for name, t in types.items()}
    draw = {name: lambda n=name: random.standard_normal(shapes[n]).astype(numpy_types[n]) for name in types}
    frames = [{name: draw[name]() for name in types if name not in pairs} for _ in range(12)]
    states = {name: draw[name]() for name in pairs}
    worst, where = worst_difference(run(after, frames, states, pairs), run(model, frames, states, pairs))
    assert worst <= tolerance, f"{where}: off by {worst:.1e}, more than {tolerance:.0e}"
    return cells, misses, after


def only(cells: list[RecognisedCell], op: str, kernel: tuple[int, int] = (3, 3)) -> RecognisedCell:
    assert [(cell.op, cell.hidden, cell.kernel) for cell in cells] == [(op, C, kernel)]
    return cells[0]
