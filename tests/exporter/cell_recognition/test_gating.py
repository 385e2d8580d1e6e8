"""Cells written in many ways, each of them replaced exactly."""

from __future__ import annotations

import re
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

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
    only,
    run,
    worst_difference,
)


@pytest.mark.parametrize(
    ("blend", "keeps"),
    [
        (BLEND, False),
        ("step = Sub (n, h)\n part = Mul (step, z)\n t = Add (part, h)", False),
        ("back = Sub (h, n)\n part = Mul (z, back)\n t = Sub (h, part)", False),
        ("new = Mul (n, z)\n zh = Mul (z, h)\n sum = Add (new, h)\n t = Sub (sum, zh)", False),
        ("zh = Mul (h, z)\n new = Mul (z, n)\n less = Neg (zh)\n kept = Add (h, less)\n t = Add (kept, new)", False),
        ("part = Sub (h, n)\n zpart = Mul (z, part)\n t = Add (n, zpart)", True),
        ("part = Sub (n, h)\n zpart = Mul (part, z)\n t = Sub (n, zpart)", True),
        ("keep = Sub (one, z)\n new = Mul (keep, n)\n old = Mul (h, z)\n t = Add (new, old)", True),
    ],
)
def test_every_way_to_write_the_blend(blend: str, keeps: bool) -> None:
    model = graph(f"{HEADER} {{ {GATES} {CANDIDATE} {blend} }}", one=ONE, **WEIGHTS)
    cells, misses, after = check(model, {"h": "t"})
    assert only(cells, "ConvGRU").note == ("update gate negated" if keeps else None)
    assert not misses
    assert [node.op_type for node in after.graph.node] == ["ConvGRU"]


def test_gates_in_one_convolution_in_either_order() -> None:
    for z, r in ((0, 1), (1, 0)):
        text = f"""{HEADER} {{
          hx = Concat <axis = 1> (h, x)
          a = Conv {SAME} (hx, W_g)
          gates = Sigmoid (a)
          g0, g1 = Split <axis = 1, num_outputs = 2> (gates)
          z = Identity (g{z})
          r = Identity (g{r})
          {CANDIDATE} {BLEND} }}"""
        weights = {"W_g": (2 * C, X + C, 3, 3), "W_n": WEIGHTS["W_n"], "b_n": (C,)}
        cells, _, _ = check(graph(text, one=ONE, **weights), {"h": "t"})
        only(cells, "ConvGRU")


def test_kernels_of_several_sizes_groups_and_one_bias() -> None:
    """5x5 on x, 3x3 in two groups on h, 1x1 for the candidate, the only bias on x."""
    text = f"""{HEADER} {{
      p_x = Conv <pads = [2, 2, 2, 2]> (x, W_x, b_x)
      x_z, x_r, x_n = Split <axis = 1, num_outputs = 3> (p_x)
      p_h = Conv <pads = [1, 1, 1, 1], group = 2> (h, W_h)
      h_z, h_r = Split <axis = 1, num_outputs = 2> (p_h)
      a_z = Add (h_z, x_z)
      a_r = Add (x_r, h_r)
      z = Sigmoid (a_z)
      r = Sigmoid (a_r)
      rh = Mul (h, r)
      h_n = Conv (rh, W_n)
      a_n = Add (h_n, x_n)
      n = Tanh (a_n)
      {BLEND} }}"""
    weights = {"W_x": (3 * C, X, 5, 5), "b_x": (3 * C,), "W_h": (2 * C, C // 2, 3, 3), "W_n": (C, C, 1, 1)}
    cells, _, _ = check(graph(text, one=ONE, **weights), {"h": "t"})
    only(cells, "ConvGRU", (5, 5))


def test_gates_behind_a_hidden_layer() -> None:
    """Only the candidate convolves the state itself; the hidden layer is an input of the op."""
    text = f"""{HEADER} {{
      xh = Concat <axis = 1> (x, h)
      c = Conv {SAME} (xh, W_z, b_z)
      layer = Relu (c)
      a = Conv (layer, W_g)
      gates = Sigmoid (a)
      z, r = Split <axis = 1, num_outputs = 2> (gates)
      {CANDIDATE} {BLEND} }}"""
    weights = {name: shape for name, shape in WEIGHTS.items() if name in ("W_z", "b_z", "W_n", "b_n")}
    cells, _, _ = check(graph(text, one=ONE, W_g=(2 * C, C, 1, 1), **weights), {"h": "t"})
    assert not only(cells, "ConvGRU").weights[2].any()


def test_what_does_not_change_a_convolution() -> None:
    """A zero Pad of its own, SAME_UPPER, a folded normalisation, a scale and an offset per channel."""
    text = f"""{HEADER} {{
      xh = Concat <axis = 1> (x, h)
      padded = Pad (xh, pads)
      c_z = Conv (padded, W_z, b_z)
      a_z = BatchNormalization (c_z, scale, b_r, b_n, variance)
      c_r = Conv <auto_pad = "SAME_UPPER"> (xh, W_r, b_r)
      s_r = Mul (c_r, scales)
      a_r = Add (offsets, s_r)
      z = Sigmoid (a_z)
      r = Sigmoid (a_r)
      {CANDIDATE} {BLEND} }}"""
    extra = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "scale": (C,),
        "variance": np.linspace(0.5, 2, C, dtype=np.float32),
        "scales": (C, 1, 1),
        "offsets": (1, C, 1, 1),
    }
    cells, _, _ = check(graph(text, one=ONE, **WEIGHTS, **extra), {"h": "t"})
    only(cells, "ConvGRU")


def test_inputs_of_another_size_and_additive_maps() -> None:
    """x is convolved with stride 2; the result enters the gates beside a map that is an input."""
    text = f"""(float[1,{X},{2 * H},{2 * W}] x, float[1,{C},{H},{W}] context, float[1,{C},{H},{W}] h)
      => (float[1,{C},{H},{W}] t) {{
      p_x = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, W_x, b_x)
      p_h = Conv {SAME} (h, W_h)
      p = Add (p_x, p_h)
      gates = Sigmoid (p)
      z, r = Split <axis = 1, num_outputs = 2> (gates)
      rh = Mul (r, h)
      h_n = Conv {SAME} (rh, W_n)
      a_n = Sub (h_n, context)
      n = Tanh (a_n)
      {BLEND} }}"""
    weights = {"W_x": (2 * C, X, 3, 3), "b_x": (2 * C,), "W_h": (2 * C, C, 3, 3), "W_n": (C, C, 3, 3)}
    cells, _, after = check(graph(text, one=ONE, **weights), {"h": "t"})
    assert only(cells, "ConvGRU").note == "context maps as input channels"
    assert [node.op_type for node in after.graph.node] == ["Conv", "Concat", "ConvGRU"]


@pytest.mark.parametrize("order", list(permutations("ifog"))[::5], ids="".join)
def test_lstm_gates_in_any_order(order: tuple[str, ...]) -> None:
    split = ", ".join(f"a_{gate}" for gate in order)
    text = f"""{LSTM_HEADER} {{
      hx = Concat <axis = 1> (h, x)
      a = Conv {SAME} (hx, W_a, b_a)
      {split} = Split <axis = 1, num_outputs = 4> (a)
      {LSTM_END} }}"""
    cells, _, after = check(graph(text, W_a=(4 * C, X + C, 3, 3), b_a=(4 * C,)), {"h": "t", "c": "u"})
    assert [(a.name, b.name) for a, b in only(cells, "ConvLSTM").states] == [("h", "t"), ("c", "u")]
    assert [node.op_type for node in after.graph.node] == ["ConvLSTM"]


def test_lstm_whose_input_is_as_wide_as_its_state() -> None:
    """Nothing but the names says which of the two is fed back."""
    header = LSTM_HEADER.replace(f"[1,{X},", f"[1,{C},").replace("t,", "h_out,")
    text = f"""{header} {{
      hx = Concat <axis = 1> (h, x)
      a = Conv {SAME} (hx, W_a, b_a)
      a_i, a_f, a_o, a_g = Split <axis = 1, num_outputs = 4> (a)
      {LSTM_END.replace(" t = Mul", " h_out = Mul")} }}"""
    cells, _, _ = check(graph(text, W_a=(4 * C, 2 * C, 3, 3), b_a=(4 * C,)), {"h": "h_out", "c": "u"})
    assert only(cells, "ConvLSTM").states[0][0].name == "h"


def test_lstm_whose_states_pass_a_mask() -> None:
    """x is as wide as the state; h is what a mask makes, as c is."""
    frame = f"float[1,{C},{H},{W}]"
    text = f"""({frame} h_in, {frame} c_in, {frame} h_now, float[1,1,1,1] mask) => ({frame} t, {frame} u) {{
      h = Mul (h_in, mask)
      c = Mul (c_in, mask)
      hx = Concat <axis = 1> (h_now, h)
      a = Conv {SAME} (hx, W_a, b_a)
      a_i, a_f, a_o, a_g = Split <axis = 1, num_outputs = 4> (a)
      {LSTM_END} }}"""
    cells, _, _ = check(graph(text, W_a=(4 * C, 2 * C, 3, 3), b_a=(4 * C,)), {"h_in": "t", "c_in": "u"})
    assert [before.name for before, _ in only(cells, "ConvLSTM").states] == ["h", "c"]


def test_two_lstm_steps_in_one_graph() -> None:
    """The second step's h is the first one's, and not the input that is as wide."""
    frame = f"float[1,{C},{H},{W}]"
    steps = ""
    for step, (x, h, c, t, u) in enumerate((("x", "h", "c", "h1", "c1"), ("v", "h1", "c1", "t", "u"))):
        body = f"""hx = Concat <axis = 1> (HH, XX)
          a = Conv {SAME} (hx, W_a, b_a)
          a_i, a_f, a_o, a_g = Split <axis = 1, num_outputs = 4> (a)
          {LSTM_END}"""
        for name in ("hx", "a", "a_i", "a_f", "a_o", "a_g", "i", "f", "o", "g", "kept", "added", "squashed"):
            body = re.sub(rf"\b{name}\b", f"{name}_{step}", body)
        for name, new in {"c": c, "t": t, "u": u, "HH": h, "XX": x}.items():
            body = re.sub(rf"\b{name}\b", new, body)
        steps += body
    text = f"({frame} v, {frame} x, {frame} h, {frame} c) => ({frame} t, {frame} u) {{ {steps} }}"
    cells, _, after = check(graph(text, W_a=(4 * C, 2 * C, 3, 3), b_a=(4 * C,)), {"h": "t", "c": "u"})
    assert [[before.name for before, _ in cell.states] for cell in cells] == [["h", "c"], ["h1", "c1"]]
    assert [node.op_type for node in after.graph.node] == ["ConvLSTM", "ConvLSTM"]


def test_five_gru_cells_on_one_state() -> None:
    """Every cell's new state is the next one's old state."""
    steps = ""
    for step in range(5):
        body = re.sub(r"\bt\b", f"h_{step + 1}", f"{GATES} {CANDIDATE} {BLEND}")
        body = re.sub(r"\bh\b", f"h_{step}", body)
        for name in ("xh", "a_z", "a_r", "z", "r", "rh", "xrh", "a_n", "n", "keep", "old", "new"):
            body = re.sub(rf"\b{name}\b", f"{name}_{step}", body)
        steps += body
    text = f"{HEADER.replace(' h)', ' h_0)').replace(' t)', ' h_5)')} {{ {steps} }}"
    cells, _, after = check(graph(text, one=ONE, **WEIGHTS), {"h_0": "h_5"})
    assert [[a.name for a in cell.states[0]] for cell in cells] == [[f"h_{n}", f"h_{n + 1}"] for n in range(5)]
    assert [node.op_type for node in after.graph.node] == ["ConvGRU"] * 5


def test_values_that_something_else_reads_stay() -> None:
    text = f"""(float[1,{X},{H},{W}] x, float[1,{C},{H},{W}] h)
      => (float[1,{C},{H},{W}] t, float[1,{C},{H},{W}] rh, float[1,{C},{H},{W}] a_z) {{
      {GATES} {CANDIDATE} {BLEND} }}"""
    cells, _, after = check(graph(text, one=ONE, **WEIGHTS), {"h": "t"})
    only(cells, "ConvGRU")
    assert sorted(node.op_type for node in after.graph.node) == ["Concat", "Conv", "Conv", "ConvGRU", "Mul", "Sigmoid"]


def test_float16_compute_with_a_float32_state() -> None:
    text = f"""(float16[1,{X},{H},{W}] x, float[1,{C},{H},{W}] h) => (float[1,{C},{H},{W}] t) {{
      h_half = Cast <to = 10> (h)
      xh = Concat <axis = 1> (x, h_half)
      a_g = Conv {SAME} (xh, W_g)
      wide_g = Cast <to = 1> (a_g)
      a_z, a_r = Split <axis = 1, num_outputs = 2> (wide_g)
      z = Sigmoid (a_z)
      r = Sigmoid (a_r)
      rh = Mul (r, h)
      rh_half = Cast <to = 10> (rh)
      xrh = Concat <axis = 1> (x, rh_half)
      a_n = Conv {SAME} (xrh, W_n)
      wide_n = Cast <to = 1> (a_n)
      n = Tanh (wide_n)
      {BLEND} }}"""
    random = np.random.default_rng(3)
    shapes = {"W_g": (2 * C, X + C, 3, 3), "W_n": (C, X + C, 3, 3)}
    weights = {name: (0.3 * random.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}
    cells, _, after = check(graph(text, one=ONE, **weights), {"h": "t"}, tolerance=3e-2)
    only(cells, "ConvGRU")
    assert [node.op_type for node in after.graph.node] == ["ConvGRU"]


def test_sizes_that_are_known_only_when_it_runs() -> None:
    text = f"(float[N,{X},H,W] x, float[N,C,H,W] h) => (float[N,C,H,W] t) {{ {GATES} {CANDIDATE} {BLEND} }}"
    after, cells, _ = fused(graph(text, one=ONE, **WEIGHTS))
    only(cells, "ConvGRU")
    frame = {"x": np.ones((2, X, 5, 9), np.float32)}
    state = {"h": np.ones((2, C, 5, 9), np.float32)}
    worst, where = worst_difference(
        run(after, [frame] * 5, state, {"h": "t"}), run(graph(text, one=ONE, **WEIGHTS), [frame] * 5, state, {"h": "t"})
    )
    assert worst <= 1e-5, f"{where}: off by {worst:.1e}"


class Lerp(nn.Module):
    """A cell that blends with torch.lerp, which exporters write as a choice between two sums."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(X + C, 2 * C, 3, padding="same")
        self.candidate = nn.Conv2d(X + C, C, 3, padding="same")

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        z, r = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        return torch.lerp(h, torch.tanh(self.candidate(torch.cat([x, r * h], 1))), z)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lerp_of_both_exporters(dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "lerp.onnx"
    sample = (torch.rand(1, X, H, W), torch.rand(1, C, H, W))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Lerp().eval(),
            sample,
            path,
            dynamo=dynamo,
            opset_version=18,
            input_names=["x", "h"],
            output_names=["t"],
            verbose=False,
        )
    cells, _, after = check(onnx.load(path), {"h": "t"})
    only(cells, "ConvGRU")
    assert [node.op_type for node in after.graph.node] == ["ConvGRU"]


def test_names_that_are_taken() -> None:
    """A file whose own weights have the names that the op's would get."""
    names = {"W_r": "cell0.W_x", "W_z": "cell0.W_h", "b_z": "cell0.b"}
    body = f"{GATES} {CANDIDATE} {BLEND}"
    for old, new in names.items():
        body = body.replace(old, f'"{new}"')
    weights = {names.get(name, name): shape for name, shape in WEIGHTS.items()}
    text = f"{HEADER.replace('t)', 't, float[1,4,6,7] a_r)')} {{ {body} }}"
    cells, _, _ = check(graph(text, one=ONE, **weights), {"h": "t"})
    only(cells, "ConvGRU")
