"""Every operator against onnx.reference, which is the ONNX standard in Python.

In float16 onnx.reference rounds after each of its own numpy calls, so what it returns for an operator that takes
several of them is one program's way, not the standard's. What holds of the evaluator:

- an operator that is one operation (`ELEMENTARY`) is equal bit for bit in float16, and a function of one element is
  rounded correctly for every float of 16 bits;
- of every other one (`COMPOSED`) the float16 result is onnx.reference's float32 result on the same values, rounded
  once, bit for bit;
- a convolution or interpolation (`REORDERED`) is that too, but for elements that lie as close to the middle of two
  floats of 16 bits as float32 sums of another order differ: fewer than one in a hundred, by one unit in the last place.
  Where all sums of a convolution are exact in float32, it is equal to onnx.reference in float16 bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from stepcell.runtime.evaluate import program_of
from tests.runtime.evaluate.operator_cases import (
    BIAS,
    COMPOSED,
    ELEMENTARY,
    KERNEL,
    REORDERED,
    WINDOWS,
    OperatorCase,
    X,
    case,
    floats,
)

Array = NDArray[Any]
# Attributes are float32, and so are some tables of onnx.reference, in float64 too.
SINGLE = 1e-6


def reference(case: OperatorCase, dtype: str) -> list[Array]:
    names = [f"o{place}" for place in range(case.outputs)]
    found: list[Any] = ReferenceEvaluator(case.model(dtype)).run(names, case.feeds(dtype))
    return [np.asarray(value) for value in found]


def evaluated(case: OperatorCase, dtype: str) -> list[Array]:
    results = program_of(case.model(dtype)).run(case.feeds(dtype))
    return [results[f"o{place}"] for place in range(case.outputs)]


def units(a: Array, b: Array) -> Array:
    """How many floats of 16 bits lie between, for floats of the same sign."""
    distance: Array = np.abs(a.view(np.int16).astype(int) - b.view(np.int16).astype(int))
    return np.where(a == b, 0, distance)  # 0 and -0


@pytest.mark.parametrize("case", ELEMENTARY, ids=str)
def test_an_operation_is_equal_bit_for_bit(case: OperatorCase) -> None:
    for expected, got in zip(reference(case, "float16"), evaluated(case, "float16"), strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("case", [*ELEMENTARY, *COMPOSED], ids=str)
def test_the_result_is_rounded_once(case: OperatorCase) -> None:
    for expected, got in zip(reference(case, "float32"), evaluated(case, "float16"), strict=True):
        assert got.shape == expected.shape
        assert np.array_equal(got, expected.astype(got.dtype), equal_nan=got.dtype.kind == "f")


@pytest.mark.parametrize("case", REORDERED, ids=str)
def test_sums_are_rounded_once_in_whatever_order(case: OperatorCase) -> None:
    for expected, got in zip(reference(case, "float32"), evaluated(case, "float16"), strict=True):
        assert got.dtype == np.float16
        assert got.shape == expected.shape
        off = units(got, expected.astype(np.float16))
        assert off.max() <= 1
        assert np.mean(off > 0) < 0.01


def on_a_grid(array: Array | None) -> Array | None:
    """Multiples of 1/4 up to 1: products and sums of a convolution of them are exact in float32 and float16."""
    return None if array is None else np.clip(np.round(array * 4) / 4, -1, 1)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no bias"])
def test_a_convolution_without_rounding_is_equal_bit_for_bit(window: dict[str, Any], bias: Array | None) -> None:
    exact = case("Conv", on_a_grid(X), on_a_grid(KERNEL), on_a_grid(bias), **window)
    for expected, got in zip(reference(exact, "float16"), evaluated(exact, "float16"), strict=True):
        assert np.array_equal(got, expected)


def test_a_convolution_is_accumulated_in_float32_and_not_in_float16() -> None:
    """2048 + 1 is 2048 in float16; float32 keeps the ones until the result is rounded."""
    ones = np.ones((1, 64, 1, 1))
    x = np.ones((1, 64, 3, 3))
    x[:, 0] = 2048
    (got,) = evaluated(case("Conv", x, ones), "float16")
    assert np.all(got == np.float16(2048 + 63))


@pytest.mark.parametrize("case", [*ELEMENTARY, *COMPOSED, *REORDERED], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_types_differ_by_their_own_rounding(case: OperatorCase, dtype: str) -> None:
    for expected, got in zip(reference(case, dtype), evaluated(case, dtype), strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        if got.dtype.kind == "f":
            scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
            assert np.allclose(got, expected, rtol=SINGLE, atol=SINGLE * scale, equal_nan=True)
        else:
            assert np.array_equal(got, expected)


# every float of 16 bits, so nothing is left to chance
EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


@pytest.mark.parametrize("op", ["Abs", "Elu", "Floor", "HardSigmoid", "Neg", "Reciprocal", "Relu", "Sqrt", "Tanh"])
def test_a_function_of_every_float16_is_equal_bit_for_bit(op: str) -> None:
    every = case(op, FINITE)
    with np.errstate(all="ignore"):
        (expected,), (got,) = reference(every, "float16"), evaluated(every, "float16")
    assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("op", ["Atan", "Cos", "Erf", "Exp", "Log", "Sin", "Softplus"])
def test_a_function_of_every_float16_is_rounded_correctly(op: str) -> None:
    """onnx.reference rounds to float32 first; up to eight of 63488 results then lie on the wrong side of a middle."""
    every = case(op, FINITE)
    with np.errstate(all="ignore"):
        (narrow,), (wide,), (got,) = (
            reference(every, "float16"),
            reference(every, "float64"),
            evaluated(every, "float16"),
        )
        off = ~((got == narrow) | np.isnan(got))
        assert np.count_nonzero(off) <= 8
        ours, theirs = (np.abs(y.astype(np.float64) - wide)[off] for y in (got, narrow))
    # so close to the middle that the Erf of onnx.reference, which is float32 in float64 too, cannot tell
    assert np.all(ours <= theirs * (1 + 1e-3))


def test_sigmoid_of_every_float16_is_rounded_correctly() -> None:
    """No neighbour is nearer to the value in 64 bits of mantissa."""
    (got,) = evaluated(case("Sigmoid", FINITE), "float16")
    with np.errstate(all="ignore"):
        exact = 1 / (1 + np.exp(-FINITE.astype(np.longdouble)))
    error = np.abs(got - exact)
    for side in (-1, 2):
        assert np.all(error <= np.abs(np.nextafter(got, np.float16(side)) - exact))


def test_bfloat16_is_rounded_like_float16() -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["n", "n"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bf16",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = floats(5000).astype(np.float32)
    got = program_of(model).run({"x": x})["y"]
    (expected,) = ReferenceEvaluator(model).run(["y"], {"x": x})
    assert got.dtype.name == "bfloat16"
    assert got.tobytes() == expected.tobytes()
