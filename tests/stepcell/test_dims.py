"""Dimension expressions: value, safety, and binding to actual shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcell.dims import bind, evaluate, substitute, symbols_of
from stepcell.errors import ContractError, InputError


@given(height=st.integers(1, 10_000), factor=st.integers(1, 64))
def test_expressions_have_pythons_meaning(height: int, factor: int) -> None:
    symbols = {"height": height, "f": factor}
    assert evaluate("height // f", symbols) == height // factor
    assert evaluate("(height + f - 1) // f * 2", symbols) == (height + factor - 1) // factor * 2
    assert evaluate(7, symbols) == 7


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "height.bit_length()",
        "height ** 9",
        "[1][0]",
        "height if 1 else 2",
        "1.5",
        "'a' * 3",
        "",
        "height //",
        "(" * 90,
        "x" * 101,
        "height / 2",
        "True",
    ],
)
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises(ContractError, match="dimension"):
        evaluate(expression, {"height": 8})


def test_division_by_zero_and_unknown_symbols() -> None:
    with pytest.raises(ContractError, match="division by zero"):
        evaluate("height // 0", {"height": 8})
    with pytest.raises(ContractError, match="symbol 'width' has no value"):
        evaluate("width", {"height": 8})


def test_symbols_in_order_and_once() -> None:
    assert symbols_of(["batch", 3, "height // 2", "width * height"]) == ["batch", "height", "width"]


def test_substitute_keeps_what_is_not_known() -> None:
    assert substitute(("batch", 3, "height // 4"), {"height": 64}) == ("batch", 3, 16)


def test_bind_finds_sizes_and_refuses_contradictions() -> None:
    x = ("x", ("batch", 3, "height", "height // 2"))
    symbols = bind([(*x, (2, 3, 8, 4))])
    assert symbols == {"batch": 2, "height": 8}
    for shape in [(2, 3, 8), (2, 4, 8, 4), (2, 3, 8, 5), (0, 3, 8, 4)]:
        with pytest.raises(InputError, match=r"x: expected shape \(batch, 3, height, height // 2\), got"):
            bind([(*x, shape)])
    with pytest.raises(InputError, match="known sizes"):
        bind([(*x, (2, 3, 8, 4)), ("flow", ("batch", 2), (3, 2))])


def test_bind_takes_tensors_in_any_order() -> None:
    image, feature = ("s0", ("batch", "height"), (2, 9)), ("f1", ("batch", "(height + 1) // 2"), (2, 5))
    assert bind([feature, image]) == bind([image, feature]) == {"batch": 2, "height": 9}
    with pytest.raises(InputError, match=r"f1: expected shape \(batch, \(height \+ 1\) // 2\), got \(2, 6\)"):
        bind([(*feature[:2], (2, 6)), image])
    with pytest.raises(InputError, match=r"f1: its shape .* follows from height, which has no value"):
        bind([feature])


def test_a_size_is_found_from_its_rows_with_chroma() -> None:
    shape = ("batch", "height * 3 // 2", "width")
    assert bind([("x", shape, (2, 27, 8))]) == {"batch": 2, "height": 18, "width": 8}
    assert bind([("x", shape, (2, 28, 8))])["height"] == 19
    with pytest.raises(InputError, match=r"x: expected shape"):  # no height has so many rows
        bind([("x", shape, (2, 29, 8))])
    with pytest.raises(InputError, match=r"x: expected shape"):
        bind([("x", shape, (2, 27, 8)), ("y", ("height",), (20,))])
    with pytest.raises(InputError, match="follows from height, which has no value"):
        bind([("x", ("height * 2 // 3",), (12,))])  # several heights have so many
