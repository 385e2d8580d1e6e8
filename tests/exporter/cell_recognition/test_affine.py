"""Sums of convolutions read from a graph, against the graph run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnxscript import ir

from stepcell.exporter.cell_recognition.affine import Affine, AffineReader
from stepcell.exporter.cell_recognition.normalise import normalise
from tests.exporter.cell_recognition.graphs import Array, graph, run

HEADER = "(float[2,3,6,7] x, float[2,4,6,7] h) => (float[2,4,6,7] a)"
SAME = "<pads = [1, 1, 1, 1]>"

EXACT = {
    "depthwise before pointwise": (
        "d = Conv <pads = [1, 1, 1, 1], group = 4> (h, D, B)\n a = Conv (d, P, B)",
        {"h": (3, 3)},
    ),
    "pointwise before 3x3": ("p = Conv (h, P)\n a = Conv <pads = [1, 1, 1, 1]> (p, H, B)", {"h": (3, 3)}),
    "dilation": ("a = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (h, H, B)", {"h": (5, 5)}),
    "groups": ("a = Conv <pads = [1, 1, 1, 1], group = 2> (h, G)", {"h": (3, 3)}),
    "one row": ("a = Conv <pads = [0, 2, 0, 2]> (h, R, B)", {"h": (1, 5)}),
    "auto_pad": ('a = Conv <auto_pad = "SAME_LOWER"> (h, H, B)', {"h": (3, 3)}),
    "concatenated, in any order": (
        "hxh = Concat <axis = 1> (h, x, h)\n a = Conv <pads = [1, 1, 1, 1]> (hxh, W, B)",
        {"h": (3, 3), "x": (3, 3)},
    ),
    "one value twice, in two sizes": (
        "p = Conv (h, P)\n q = Conv <pads = [1, 1, 1, 1]> (h, H, B)\n a = Sub (p, q)",
        {"h": (3, 3)},
    ),
    "a range of a range": (
        """xh = Concat <axis = 1> (x, h)
        w = Conv <pads = [1, 1, 1, 1]> (xh, W2)
        first, second = Split <axis = 1, num_outputs = 2> (w)
        a = Neg (second)""",
        {"x": (3, 3), "h": (3, 3)},
    ),
    "constants": (
        "c = Conv <pads = [1, 1, 1, 1]> (h, H)\n s = Mul (S, c)\n d = Div (s, two)\n a = Add (d, S)",
        {"h": (3, 3)},
    ),
}
SHAPES = {
    "D": (4, 1, 3, 3),
    "P": (4, 4, 1, 1),
    "H": (4, 4, 3, 3),
    "G": (4, 2, 3, 3),
    "R": (4, 4, 1, 5),
    "W": (4, 11, 3, 3),
    "W2": (8, 7, 3, 3),
    "B": (4,),
    "S": (1, 4, 1, 1),
    "two": np.float32(2),
}
# The border of these is not that of one convolution: their inner value stays one of its own.
INEXACT = {
    "two padded kernels": f"d = Conv {SAME} (h, H)\n a = Conv {SAME} (d, H)",
    "a bias inside": f"d = Conv (h, P, B)\n a = Conv {SAME} (d, H)",
}


def read(body: str, *, through: bool = True) -> tuple[Affine, dict[str, Array], Array]:
    """The sum, a value for each of its sources, and the result of the graph."""
    used = {name: shape for name, shape in SHAPES.items() if f" {name}" in body or f"({name}" in body}
    model = graph(f"{HEADER} {{ {body} }}", **used)
    copy = ir.from_proto(model)
    normalise(copy)
    found = AffineReader(lambda _: through).read(copy.graph.outputs[0])
    random = np.random.default_rng(0)
    frame = {name: random.standard_normal((2, n, 6, 7)).astype(np.float32) for name, n in (("x", 3), ("h", 4))}
    for value in found.kernels:  # values inside become outputs, to see what they are
        if not value.is_graph_input():
            model.graph.output.add().CopyFrom(ir.to_proto(value))
    outputs = run(model, [{v.name: frame[v.name] for v in model.graph.input}], {}, {})[0]
    return found, {**frame, **outputs}, outputs["a"]


def evaluate(found: Affine, values: dict[str, Array]) -> Array:
    total = torch.tensor(found.bias)[None, :, None, None]
    for source, kernel in found.kernels.items():
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        frame = torch.tensor(values[str(source.name)], dtype=torch.float64)
        total = total + torch.nn.functional.conv2d(frame, torch.tensor(kernel), padding=padding)
    return total.numpy()


@pytest.mark.parametrize("case", EXACT)
def test_sum_of_convolutions(case: str) -> None:
    body, kernels = EXACT[case]
    found, values, truth = read(body)
    assert {str(s.name): k.shape[2:] for s, k in found.kernels.items()} == kernels
    worst = np.abs(evaluate(found, values) - truth).max()
    assert worst <= 1e-5, f"off by {worst:.1e}"


@pytest.mark.parametrize("case", INEXACT)
def test_what_has_another_border_is_not_multiplied(case: str) -> None:
    found, values, truth = read(INEXACT[case])
    assert [str(source.name) for source in found.kernels] == ["d"]
    worst = np.abs(evaluate(found, values) - truth).max()
    assert worst <= 1e-5, f"off by {worst:.1e}"


def test_inputs_are_not_taken_apart() -> None:
    """A convolution before the cell that does not see its state stays outside of it."""
    found, _, _ = read("d = Conv <pads = [1, 1, 1, 1], group = 4> (h, D, B)\n a = Conv (d, P, B)", through=False)
    assert {str(source.name): kernel.shape[2:] for source, kernel in found.kernels.items()} == {"d": (1, 1)}
