"""Forward-mode derivatives of every operator, against central differences in float64."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepcell.errors import EvaluationError
from stepcell.runtime.evaluate import program_of
from tests.runtime.evaluate.operator_cases import COMPOSED, ELEMENTARY, REORDERED, OperatorCase, case, floats

# Inputs whose change is not followed: statistics, weights of recurrent nodes, sizes, limits and fill values.
FIXED = {
    "BatchNormalization": {"i1", "i2", "i3", "i4"},
    "DequantizeLinear": {"i1"},
    **{op: {"i1", "i2", "i3", "i7"} for op in ("GRU", "LSTM", "RNN")},
    **{op: {"i1", "i2"} for op in ("Clip", "Mod", "Pad")},
    "OneHot": {"i2"},
    "Range": {"i0", "i1", "i2"},
    "Resize": {"i2"},
}
CASES = [case for case in (*ELEMENTARY, *COMPOSED, *REORDERED) if case.op != "QuantizeLinear"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_central_differences(case: OperatorCase) -> None:
    program, feeds = program_of(case.model("float64"), "float64"), case.feeds("float64")
    rng = np.random.default_rng(1)
    moving = [n for n, v in feeds.items() if v.dtype == np.float64 and n not in FIXED.get(case.op, set())]
    # off the grid of float16, so that equal elements and kinks are not met
    feeds.update({name: feeds[name] + rng.uniform(-1e-4, 1e-4, feeds[name].shape) for name in moving})
    tangents = {name: rng.standard_normal(feeds[name].shape) for name in moving}
    results, changes = program.run_jvp(feeds, tangents)
    step = 1e-6
    after, before = (program.run({**feeds, **{n: feeds[n] + s * tangents[n] for n in moving}}) for s in (step, -step))
    for name, value in results.items():
        assert np.array_equal(value, program.run(feeds)[name], equal_nan=value.dtype.kind == "f")
        if value.dtype != np.float64:
            assert changes[name] is None
            continue
        numeric = (after[name] - before[name]) / (2 * step)
        exact = np.zeros_like(numeric) if changes[name] is None else changes[name]
        assert exact.shape == value.shape
        assert np.abs(numeric - exact).max(initial=0) <= 1e-7 * max(1.0, np.abs(numeric).max(initial=0))


def test_two_moving_factors_add_up() -> None:
    """A product of a value with itself: 2 x dx."""
    square = case("Mul", floats(3), floats(3))
    model = square.model("float64")
    model.graph.node[0].input[:] = ["i0", "i0"]
    x, dx = np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])
    _, changes = program_of(model, "float64").run_jvp({"i0": x, "i1": x}, {"i0": dx})
    assert np.array_equal(changes["o0"], 2 * x * dx)


def test_what_does_not_change_has_no_tangent() -> None:
    program = program_of(case("Mul", floats(3), floats(3)).model("float64"), "float64")
    _, changes = program.run_jvp({"i0": np.ones(3), "i1": np.ones(3)}, {})
    assert changes == {"o0": None}


def test_a_cast_to_an_integer_has_none() -> None:
    program = program_of(case("Cast", floats(3), to=TensorProto.INT64).model("float64"), "float64")
    _, changes = program.run_jvp({"i0": np.ones(3)}, {"i0": np.ones(3)})
    assert changes == {"o0": None}


def test_a_derivative_that_is_not_written_is_named() -> None:
    norm = case("BatchNormalization", floats(2, 4, 3, 3), floats(4), floats(4), floats(4), floats(4) ** 2)
    feeds = norm.feeds("float64")
    with pytest.raises(EvaluationError, match=r"node 'o0' \(BatchNormalization\): its derivative with respect to"):
        program_of(norm.model("float64"), "float64").run_jvp(feeds, {"i3": np.ones(4)})


def test_rounding_to_integers_passes_changes_on() -> None:
    """As on average over many values; nothing passes where the integer is at its limit."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, [4]) for name in "xy")
    constants = [
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    graph = helper.make_graph(nodes, "levels", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    values, changes = program_of(model, "float64").run_jvp(
        {"x": np.array([0.3, -7.9, 63.4, 100.0])}, {"x": np.array([1.0, 2.0, 3.0, 4.0])}
    )
    assert values["y"].tolist() == [0.5, -8.0, 63.5, 63.5]
    assert changes["y"].tolist() == [1.0, 2.0, 0.0, 0.0]
