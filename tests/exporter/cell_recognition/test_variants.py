"""Variants of the ops, each in several spellings: reset after, hard gates, peepholes, dense cells, wide states."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest

from tests.exporter.cell_recognition.graphs import (
    BLEND,
    CANDIDATE,
    GATES,
    HEADER,
    LSTM_END,
    LSTM_HEADER,
    ONE,
    SAME,
    WEIGHTS,
    Array,
    C,
    H,
    W,
    X,
    check,
    graph,
    only,
)

NUMBERS = {
    name: np.float32(value) for name, value in (("zero", 0), ("half", 0.5), ("two", 2), ("three", 3), ("six", 6))
}
NUMBERS |= {"minus": np.float32(-1), "one": ONE}


def used(body: str, **weights: tuple[int, ...] | Array) -> dict[str, Any]:
    """Those of the weights and numbers that a graph reads."""
    every: dict[str, Any] = {**NUMBERS, **weights}
    return {name: value for name, value in every.items() if re.search(rf"\b{name}\b", body)}


RESET_AFTER = {
    "two convolutions": (
        f"""g_n = Conv {SAME} (h, U_n, c_n)
        rg = Mul (r, g_n)
        p_n = Conv {SAME} (x, V_n, b_n)
        a_n = Add (p_n, rg)""",
        BLEND,
    ),
    "r second, the bias added apart, z keeps": (
        f"""q_n = Conv {SAME} (h, U_n)
        g_n = Add (q_n, c_map)
        rg = Mul (g_n, r)
        p_n = Conv {SAME} (x, V_n)
        a_n = Add (rg, p_n)""",
        "part = Sub (h, n)\n zpart = Mul (z, part)\n t = Add (n, zpart)",
    ),
    "another kernel size, subtracted": (
        f"""q_n = Conv (h, U_1)
        rg = Mul (r, q_n)
        p_n = Conv {SAME} (x, V_n)
        a_n = Sub (p_n, rg)""",
        BLEND,
    ),
}


@pytest.mark.parametrize("case", RESET_AFTER)
def test_reset_after_the_recurrent_convolution(case: str) -> None:
    candidate, blend = RESET_AFTER[case]
    text = f"{HEADER} {{ {GATES} {candidate} n = Tanh (a_n) {blend} }}"
    shapes = {"U_n": (C, C, 3, 3), "V_n": (C, X, 3, 3), "U_1": (C, C, 1, 1), "c_n": (C,), "c_map": (1, C, 1, 1)}
    cells, misses, after = check(graph(text, **used(text, **WEIGHTS, **shapes)), {"h": "t"})
    assert only(cells, "ConvGRU").reset == "after"
    assert not misses
    assert [node.op_type for node in after.graph.node] == ["ConvGRU"]


def test_reset_after_with_packed_convolutions() -> None:
    """As cuDNN: r, z, n of x in one convolution and of h in another."""
    text = f"""{HEADER} {{
      p = Conv {SAME} (x, V, b)
      p_r, p_z, p_n = Split <axis = 1, num_outputs = 3> (p)
      q = Conv {SAME} (h, U, c)
      q_r, q_z, q_n = Split <axis = 1, num_outputs = 3> (q)
      a_r = Add (p_r, q_r)
      a_z = Add (p_z, q_z)
      r = Sigmoid (a_r)
      z = Sigmoid (a_z)
      rg = Mul (r, q_n)
      a_n = Add (p_n, rg)
      n = Tanh (a_n)
      {BLEND} }}"""
    shapes = {"V": (3 * C, X, 3, 3), "U": (3 * C, C, 3, 3), "b": (3 * C,), "c": (3 * C,)}
    cells, _, _ = check(graph(text, one=ONE, **shapes), {"h": "t"})
    cell = only(cells, "ConvGRU")
    assert (cell.reset, len(cell.weights), cell.weights[4].shape) == ("after", 5, (C,))


# Each gives z, r or n from its pre-activation a; the spelling decides the slope of the line.
HARD_SIGMOID = {
    "HardSigmoid, the op's": "@ = HardSigmoid <alpha = 0.5, beta = 0.5> (a_@)",
    "HardSigmoid, ONNX's default": "@ = HardSigmoid (a_@)",
    "HardSigmoid, off centre": "@ = HardSigmoid <alpha = 0.25, beta = 0.4> (a_@)",
    "clip of a line": "s_@ = Mul (half, a_@)\n l_@ = Add (s_@, half)\n @ = Clip (l_@, zero, one)",
    "Relu6 / 6": "l_@ = Add (a_@, three)\n k_@ = Clip (l_@, zero, six)\n @ = Div (k_@, six)",
    "two clips": "l_@ = Add (a_@, half)\n k_@ = Max (l_@, zero)\n @ = Min (one, k_@)",
    "Relu and Min": "l_@ = Add (a_@, half)\n k_@ = Relu (l_@)\n @ = Min (k_@, one)",
}
HARD_TANH = {"clip": "@ = Clip (a_@, minus, one)", "steeper": "s_@ = Mul (a_@, two)\n @ = Clip (s_@, minus, one)"}


@pytest.mark.parametrize("sigmoid", HARD_SIGMOID)
@pytest.mark.parametrize("tanh", HARD_TANH)
def test_hard_gates_in_every_spelling(sigmoid: str, tanh: str) -> None:
    body = f"{GATES} {CANDIDATE} {BLEND}"
    for gate in "zr":
        body = body.replace(f"{gate} = Sigmoid (a_{gate})", HARD_SIGMOID[sigmoid].replace("@", gate))
    body = body.replace("n = Tanh (a_n)", HARD_TANH[tanh].replace("@", "n"))
    cells, _, after = check(graph(f"{HEADER} {{ {body} }}", **used(body, **WEIGHTS)), {"h": "t"})
    assert only(cells, "ConvGRU").gates == "hard"
    assert [node.op_type for node in after.graph.node] == ["ConvGRU"]


def test_hard_gates_of_an_lstm_clipped_before_the_split() -> None:
    text = f"""{LSTM_HEADER} {{
      xh = Concat <axis = 1> (x, h)
      a = Conv {SAME} (xh, W_a, b_a)
      a_g, a_ifo = Split <axis = 1> (a, parts)
      line = Add (a_ifo, half)
      gates = Clip (line, zero, one)
      i, f, o = Split <axis = 1, num_outputs = 3> (gates)
      g = Clip (a_g, minus, one)
      kept = Mul (f, c)
      added = Mul (g, i)
      u = Add (added, kept)
      low = Max (u, minus)
      squashed = Min (low, one)
      t = Mul (squashed, o) }}"""
    shapes = {"W_a": (4 * C, X + C, 3, 3), "b_a": (4 * C,), "parts": np.array([C, 3 * C])}
    cells, _, after = check(graph(text, **used(text, **shapes)), {"h": "t", "c": "u"})
    assert only(cells, "ConvLSTM").gates == "hard"
    assert [node.op_type for node in after.graph.node] == ["ConvLSTM"]


@pytest.mark.parametrize("limits", ["zero, six", "half, one", "minus, half"])
def test_other_clips_are_no_hard_gates(limits: str) -> None:
    body = f"{GATES} {CANDIDATE} {BLEND}".replace("z = Sigmoid (a_z)", f"z = Clip (a_z, {limits})")
    cells, misses, _ = check(graph(f"{HEADER} {{ {body} }}", **used(body, **WEIGHTS)), {"h": "t"})
    assert (cells, misses) == ([], [])


def lstm(peepholes: dict[str, str]) -> str:
    """An LSTM with a term added to some of its gates."""
    end = LSTM_END
    if "o" in peepholes:  # computed after the new c
        end = end.replace("o = Sigmoid (a_o)\n", "").replace("squashed =", "o = Sigmoid (a_o)\n squashed =")
    for gate, term in peepholes.items():
        line = f"{gate} = Sigmoid (a_{gate})"
        new = f"{term.replace('@', f'e_{gate}')}\n p_{gate} = Add (e_{gate}, a_{gate})\n {gate} = Sigmoid (p_{gate})"
        end = end.replace(line, new)
    return f"""{LSTM_HEADER} {{
      xh = Concat <axis = 1> (x, h)
      a = Conv {SAME} (xh, W_a)
      a_i, a_f, a_o, a_g = Split <axis = 1, num_outputs = 4> (a)
      {end} }}"""


CHANNEL = {"i": "@ = Mul (c, w_i)", "f": "@ = Mul (w_f, c)", "o": "@ = Mul (u, w_o)"}
MAP = {"i": "@ = Mul (c, m_i)", "f": "@ = Mul (m_f, c)", "o": "@ = Mul (u, m_o)"}


@pytest.mark.parametrize(
    ("peepholes", "shape"),
    [
        (CHANNEL, (3, C, 1, 1)),
        ({"f": CHANNEL["f"]}, (3, C, 1, 1)),
        ({"o": CHANNEL["o"]}, (3, C, 1, 1)),
        ({"i": "@ = Identity (c)"}, (3, C, 1, 1)),
        (MAP, (3, C, H, W)),
        ({"f": MAP["f"], "o": CHANNEL["o"]}, (3, C, H, W)),
        ({"i": "@ = Mul (c, row)"}, (3, C, H, W)),
    ],
)
def test_peepholes(peepholes: dict[str, str], shape: tuple[int, ...]) -> None:
    text = lstm(peepholes)
    shapes: dict[str, Any] = {"W_a": (4 * C, X + C, 3, 3), "row": (1, C, 1, W)}
    shapes |= dict.fromkeys(("w_i", "w_f", "w_o"), (C, 1, 1)) | dict.fromkeys(("m_i", "m_f", "m_o"), (1, C, H, W))
    cells, _, after = check(graph(text, **used(text, **shapes)), {"h": "t", "c": "u"})
    cell = only(cells, "ConvLSTM")
    assert cell.peephole
    assert cell.weights[-1].shape == shape
    assert [node.op_type for node in after.graph.node] == ["ConvLSTM"]


F = 5
DENSE_HEADER = f"(float[N,{F}] x, float[N,{C}] h) => (float[N,{C}] t)"
DENSE_GRU = f"""
  p = Gemm <transB = 1> (x, V, b)
  q = Gemm <transB = 1> (h, U, c)
  p_r, p_z, p_n = Split <axis = 1, num_outputs = 3> (p)
  q_r, q_z, q_n = Split <axis = -1, num_outputs = 3> (q)
  a_r = Add (p_r, q_r)
  a_z = Add (p_z, q_z)
  r = Sigmoid (a_r)
  z = Sigmoid (a_z)
  rg = Mul (r, q_n)
  a_n = Add (p_n, rg)
  n = Tanh (a_n)
  {BLEND}
"""
DENSE_BEFORE = f"""
  xh = Concat <axis = -1> (x, h)
  p = MatMul (xh, W_g)
  a = Add (p, b_g)
  gates = Sigmoid (a)
  z, r = Split <axis = 1, num_outputs = 2> (gates)
  rh = Mul (r, h)
  xrh = Concat <axis = 1> (x, rh)
  a_n = Gemm <alpha = 0.5, beta = 2.0> (xrh, W_n, b_n)
  n = Tanh (a_n)
  {BLEND}
"""


@pytest.mark.parametrize("body", [DENSE_GRU, DENSE_BEFORE])
def test_dense_gru(body: str) -> None:
    shapes = {"V": (3 * C, F), "U": (3 * C, C), "b": (3 * C,), "c": (3 * C,)}
    shapes |= {"W_g": (F + C, 2 * C), "b_g": (2 * C,), "W_n": (F + C, C), "b_n": (C,)}
    model = graph(f"{DENSE_HEADER} {{ {body} }}", **used(body, **shapes))
    cells, misses, after = check(model, {"h": "t"})
    cell = only(cells, "ConvGRU", (1, 1))
    assert cell.is_dense
    assert not misses
    assert sum(node.op_type == "ConvGRU" for node in after.graph.node) == 1
    assert {node.op_type for node in after.graph.node} == {"ConvGRU", "Unsqueeze", "Squeeze"}


def test_dense_lstm() -> None:
    text = f"""(float[N,{F}] x, float[N,{C}] h, float[N,{C}] c) => (float[N,{C}] t, float[N,{C}] u) {{
      p = MatMul (x, V)
      q = Gemm (h, U, p)
      a = Add (q, b)
      a_i, a_f, a_g, a_o = Split <axis = 1, num_outputs = 4> (a)
      {LSTM_END} }}"""
    cells, _, _ = check(graph(text, V=(F, 4 * C), U=(C, 4 * C), b=(1, 4 * C)), {"h": "t", "c": "u"})
    assert only(cells, "ConvLSTM", (1, 1)).is_dense


def test_tokens_are_no_features() -> None:
    """A GRU over [N, tokens, C] has its channels last; the op has them on axis 1."""
    gemm = "Gemm <alpha = 0.5, beta = 2.0> (xrh, W_n, b_n)"
    text = DENSE_BEFORE.replace("axis = 1", "axis = -1").replace(gemm, "MatMul (xrh, W_n)")
    header = f"(float[N,6,{F}] x, float[N,6,{C}] h) => (float[N,6,{C}] t)"
    shapes = {"W_g": (F + C, 2 * C), "b_g": (2 * C,), "W_n": (F + C, C)}
    cells, misses, _ = check(graph(f"{header} {{ {text} }}", one=ONE, **shapes), {"h": "t"})
    assert (cells, misses) == ([], [])


def test_float32_states_pass_a_float16_cell_unrounded() -> None:
    """Two cells on one state, both states stacked in one tensor; each converted on entry and exit."""
    random = np.random.default_rng(5)
    step = f"""
      xh_@ = Concat <axis = 1> (x, h_@)
      a_@ = Conv {SAME} (xh_@, W_@)
      z_@, r_@ = Split <axis = 1, num_outputs = 2> (a_@)
      sz_@ = Sigmoid (z_@)
      sr_@ = Sigmoid (r_@)
      rh_@ = Mul (sr_@, h_@)
      xrh_@ = Concat <axis = 1> (x, rh_@)
      an_@ = Conv {SAME} (xrh_@, V_@)
      n_@ = Tanh (an_@)
      d_@ = Sub (n_@, h_@)
      zd_@ = Mul (sz_@, d_@)
      t_@ = Add (h_@, zd_@)"""
    states = f"float[2,1,{C},{H},{W}]"
    text = f"""(float16[1,{X},{H},{W}] x, {states} s) => ({states} t, float16[1,{C},{H},{W}] y) {{
      half = Cast <to = 10> (s)
      h_a = Gather (half, first)
      h_b = Gather (half, second)
      {step.replace("@", "a")}
      {step.replace("@", "b")}
      {step.replace("@", "c").replace("h_c", "t_b").replace("rt_b", "rh_c").replace("xt_b", "xh_c")}
      ta = Unsqueeze (t_a, axis)
      tc = Unsqueeze (t_c, axis)
      stack = Concat <axis = 0> (ta, tc)
      t = Cast <to = 1> (stack)
      y = Identity (t_b) }}"""
    weights: dict[str, Any] = {"first": np.array(0), "second": np.array(1), "axis": np.array([0])}
    for cell in "abc":
        weights[f"W_{cell}"] = (0.3 * random.standard_normal((2 * C, X + C, 3, 3))).astype(np.float16)
        weights[f"V_{cell}"] = (0.3 * random.standard_normal((C, X + C, 3, 3))).astype(np.float16)
    cells, _, after = check(graph(text, **weights), {"s": "t"}, tolerance=3e-2)
    assert len(cells) == 3
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(after).graph.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*after.graph.input, *after.graph.output)}
    assert not [node for node in after.graph.node if node.op_type == "Cast"]
    for node in after.graph.node:
        if node.op_type == "ConvGRU":
            assert types[node.input[1]] == types[node.output[0]] == onnx.TensorProto.FLOAT


def test_weights_that_folding_leaves_as_views_in_another_order() -> None:
    """Weights that the graph transposes are views after folding, which the pass that compares weights does not take."""
    body = GATES.replace("W_z, b_z", "V_z, b_z") + CANDIDATE + BLEND
    text = f"{HEADER} {{ V_z = Transpose <perm = [3, 2, 1, 0]> (U_z) {body} }}"
    weights = {name: shape for name, shape in WEIGHTS.items() if name != "W_z"}
    cells, _, _ = check(graph(text, one=ONE, U_z=(3, 3, X + C, C), **weights), {"h": "t"})
    only(cells, "ConvGRU")
