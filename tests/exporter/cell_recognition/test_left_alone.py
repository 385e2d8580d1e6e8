"""Near misses: graphs that resemble a cell but are not computed by an op are left alone, with the reason."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.version_converter
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
    C,
    H,
    W,
    X,
    check,
    fused,
    graph,
    run,
    worst_difference,
)
from tests.exporter.from_onnx.cases import find_cases


def test_blend_by_a_mask_is_no_cell() -> None:
    """Alpha compositing: the mask comes from outside."""
    frame = f"float[1,{C},{H},{W}]"
    text = f"""({frame} alpha, {frame} x, {frame} h) => ({frame} t) {{
      z = Sigmoid (alpha)
      n = Tanh (x)
      {BLEND} }}"""
    cells, misses, _ = check(graph(text, one=ONE), {"h": "t"})
    assert (cells, misses) == ([], [])


def test_a_state_that_is_rounded_is_another_value() -> None:
    """A cast to integers is no change of precision."""
    text = f"""{HEADER} {{
      whole = Cast <to = 6> (h)
      stale = Cast <to = 1> (whole)
      {GATES} {CANDIDATE.replace("(r, h)", "(r, stale)")} {BLEND} }}"""
    cells, misses, _ = check(graph(text, one=ONE, **WEIGHTS), {"h": "t"})
    assert not cells
    assert len(misses) == 1


def test_a_state_made_of_zeros_inside() -> None:
    text = f"""(float[N,{X},H,W] x) => (float[N,{C},H,W] t) {{
      n_size = Shape <start = 0, end = 1> (x)
      map_size = Shape <start = 2> (x)
      sizes = Concat <axis = 0> (n_size, channels, map_size)
      h = ConstantOfShape (sizes)
      {GATES} {CANDIDATE} {BLEND} }}"""
    _, cells, misses = fused(graph(text, one=ONE, channels=np.array([C]), **WEIGHTS))
    assert not cells
    assert "made inside the graph" in misses[0].reason


LEFT_ALONE = {
    "another state is reset": (
        f"(float[1,{X},{H},{W}] x, float[1,{C},{H},{W}] h, float[1,{C},{H},{W}] stale) => (float[1,{C},{H},{W}] t)",
        f"{GATES} {CANDIDATE.replace('(r, h)', '(r, stale)')} {BLEND}",
        "Mul between the convolution of the state and the gate",
    ),
    "no reset gate": (
        HEADER,
        f"{GATES} {CANDIDATE.replace('rh = Mul (r, h)', 'rh = Identity (h)')} {BLEND}",
        "without a reset gate",
    ),
    "the old state beside the reset one": (
        HEADER,
        f"""{GATES} rh = Mul (r, h)
          xrh = Concat <axis = 1> (x, rh)
          p_n = Conv {SAME} (xrh, W_n, b_n)
          q_n = Conv {SAME} (xh, W_n, b_n)
          a_n = Add (p_n, q_n)
          n = Tanh (a_n) {BLEND}""",
        "also sees the state without the reset gate",
    ),
    "something nonlinear on the way": (
        HEADER,
        GATES.replace("z = Sigmoid (a_z)", "s_z = Relu (a_z)\n z = Sigmoid (s_z)") + f"{CANDIDATE} {BLEND}",
        "Relu between",
    ),
    "a bias before a padded convolution": (
        HEADER,
        f"""{GATES} rh = Mul (r, h)
          mixed = Conv (rh, W_m, b_m)
          xrh = Concat <axis = 1> (x, mixed)
          a_n = Conv {SAME} (xrh, W_n, b_n)
          n = Tanh (a_n) {BLEND}""",
        "a bias before a padded convolution",
    ),
    "an even kernel": (
        HEADER,
        GATES + CANDIDATE.replace("[1, 1, 1, 1]> (xrh, W_n", "[0, 0, 1, 1]> (xrh, W_e") + BLEND,
        "even kernel (2x2)",
    ),
    "an input of one pixel": (
        HEADER.replace(f"[1,{X},{H},{W}]", f"[1,{X},1,1]"),
        f"""p_x = Conv (x, W_p)
          p_z = Conv {SAME} (h, W_q)
          a_z = Add (p_z, p_x)
          z = Sigmoid (a_z)
          rh = Mul (z, h)
          p_n = Conv {SAME} (rh, W_q)
          a_n = Add (p_n, p_x)
          n = Tanh (a_n) {BLEND}""",
        "size 1 on axis 2",
    ),
    "zeros for a state, in two tensors": (
        HEADER.replace(f"{H},{W}", "20,20"),
        GATES.replace("(x, h)", "(x, none)")
        + CANDIDATE.replace("(r, h)", "(r, none)")
        + BLEND.replace(", h)", ", no)"),
        "made inside the graph",
    ),
    "hard gates": (
        HEADER,
        GATES.replace("z = Sigmoid", "z = HardSigmoid <alpha = 0.5, beta = 0.5>") + f"{CANDIDATE} {BLEND}",
        "hard gates beside soft ones (hard sigmoid, tanh)",
    ),
    "the reset gate on more than the recurrent product": (
        HEADER,
        f"""{GATES} g_n = Conv {SAME} (xh, W_n)
          rg = Mul (r, g_n)
          a_n = Conv (x, W_p)
          s_n = Add (rg, a_n)
          n = Tanh (s_n) {BLEND}""",
        "Mul between the convolution of the state and the gate",
    ),
    "a reset gate after, and the state beside it": (
        HEADER,
        f"""{GATES} g_n = Conv {SAME} (h, W_q)
          rg = Mul (r, g_n)
          a_n = Conv {SAME} (xh, W_n)
          s_n = Add (rg, a_n)
          n = Tanh (s_n) {BLEND}""",
        "also sees the state without the reset gate",
    ),
    "a stride of two and an upsampling": (
        f"(float[1,{X},{H},{H}] x, float[1,{C},{H},{H}] h) => (float[1,{C},{H},{H}] t)",
        f"""{GATES} rh = Mul (r, h)
          xrh = Concat <axis = 1> (x, rh)
          small = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (xrh, W_n, b_n)
          a_n = Resize <mode = "nearest"> (small, , scales)
          n = Tanh (a_n) {BLEND}""",
        "Resize between",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_the_op_cannot_do_is_left_alone(case: str) -> None:
    header, body, reason = LEFT_ALONE[case]
    extra = {"W_m": (C, C, 1, 1), "b_m": (C,), "scales": np.array([1, 1, 2, 2], np.float32)}
    extra |= {"W_e": (C, X + C, 2, 2), "W_p": (C, X, 1, 1), "W_q": (C, C, 3, 3)}
    extra |= {name: np.zeros((1, C, 20, 20), np.float32) for name in ("no", "none")}
    used = {name: shape for name, shape in {**WEIGHTS, **extra}.items() if re.search(rf"\b{name}\b", body)}
    cells, misses, _ = check(graph(f"{header} {{ {body} }}", one=ONE, **used), {"h": "t"})
    assert not cells
    assert [(miss.kind, miss.hidden, miss.kernel) for miss in misses] == [("ConvGRU", C, (3, 3))]
    assert reason in misses[0].reason


def test_lists_and_loops_of_a_cell_that_stays() -> None:
    """TorchScript's tensor_split is a Loop that fills a list; written out, it still runs."""
    case = next(case for case in find_cases() if case.name == "rvt_depthwise_xh_ts")
    model = onnx.version_converter.convert_version(case.model, 18)
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Tanh")
    last.op_type = "Relu"  # of the new c: no ConvLSTM any more
    after, cells, misses = fused(model)
    assert not cells
    assert "takes Relu" in misses[0].reason
    assert not {"Loop", "SequenceAt"} & {node.op_type for node in after.graph.node}
    frames, states, pairs = case.frames[:4], case.states, case.pairs
    worst, where = worst_difference(run(after, frames, states, pairs), run(model, frames, states, pairs))
    assert worst <= 1e-5, f"{where}: off by {worst:.1e}"


PEEPHOLES = {
    "the output gate sees the old cell state": ("o", "seen = Mul (c, w)", "the output gate sees the old value"),
    "the candidate sees the cell state": ("g", "seen = Mul (c, w)", "the candidate sees the cell state"),
    "a convolution of the cell state": ("f", f"seen = Conv {SAME} (c, W_c)", "through a convolution"),
    "a square of the cell state": ("f", "cc = Mul (c, c)\n seen = Mul (cc, w)", "in another way than as peephole"),
    "a weight from outside": ("f", "seen = Mul (c, x_w)", "in another way than as peephole"),
}


@pytest.mark.parametrize("case", PEEPHOLES)
def test_lstm_that_uses_its_cell_state_otherwise_is_left_alone(case: str) -> None:
    gate, term, reason = PEEPHOLES[case]
    function = "Tanh" if gate == "g" else "Sigmoid"
    end = LSTM_END.replace(
        f"{gate} = {function} (a_{gate})", f"{term}\n p = Add (a_{gate}, seen)\n {gate} = {function} (p)"
    )
    header = LSTM_HEADER.replace(" c)", f" c, float[1,{C},1,1] x_w)") if "x_w" in term else LSTM_HEADER
    text = f"""{header} {{
      xh = Concat <axis = 1> (x, h)
      a = Conv {SAME} (xh, W_a)
      a_i, a_f, a_o, a_g = Split <axis = 1, num_outputs = 4> (a)
      {end} }}"""
    extra = {name: shape for name, shape in {"w": (C, 1, 1), "W_c": (C, C, 3, 3)}.items() if f"{name})" in term}
    cells, misses, _ = check(graph(text, W_a=(4 * C, X + C, 3, 3), **extra), {"h": "t", "c": "u"})
    assert not cells
    assert reason in misses[0].reason
