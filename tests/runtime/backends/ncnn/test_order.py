"""States before frames in the sums of a convolution."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import numpy_helper

from stepcell.runtime.backends.ncnn.order import states_first

TEXT = """<ir_version: 10, opset_import: ["": 20]>
m (float[1,3,6,6] x, float[1,5,6,6] h) => (float[1,5,6,6] y, float[1,8,6,6] kept) {
    xh = Concat<axis=1>(x, h)
    g = Conv<pads=[1,1,1,1]>(xh, w)
    r = Sigmoid(g)
    rh = Mul(r, h)
    xrh = Concat<axis=1>(x, rh)
    y = Conv<pads=[1,1,1,1]>(xrh, w)
    kept = Concat<axis=1>(x, y) }"""


def model() -> onnx.ModelProto:
    parsed = onnx.parser.parse_model(TEXT)
    weights = np.random.default_rng(0).normal(size=(5, 8, 3, 3)).astype(np.float32)
    parsed.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    return parsed


def test_states_come_first_and_nothing_else_changes() -> None:
    before, after = model(), model()
    assert states_first(after, ["h"]) == 2
    concats = [list(node.input) for node in after.graph.node if node.op_type == "Concat"]
    assert concats == [["h", "x"], ["rh", "x"], ["x", "y"]]  # an output keeps its channels
    feeds = {name: np.random.default_rng(1).random((1, c, 6, 6), np.float32) for name, c in (("x", 3), ("h", 5))}
    results = [onnxruntime.InferenceSession(m.SerializeToString()).run(None, feeds) for m in (before, after)]
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert not np.array_equal(found, expected)  # another order of the sums


def test_what_is_in_order_is_left_alone() -> None:
    first = model()
    states_first(first, ["h"])
    again = onnx.ModelProto()
    again.CopyFrom(first)
    assert states_first(again, ["h"]) == 0
    assert again.SerializeToString() == first.SerializeToString()


def test_a_concatenation_with_another_reader_is_left_alone() -> None:
    parsed = model()
    node = next(node for node in parsed.graph.node if node.output[0] == "kept")
    node.op_type, node.input[:] = "Identity", ["xh"]
    del node.attribute[:]
    assert states_first(parsed, ["h"]) == 1
