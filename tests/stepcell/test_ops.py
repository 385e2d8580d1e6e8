"""The table of the ops agrees with the reference arithmetic and with the functions in exported files."""

from __future__ import annotations

import inspect

import pytest

from stepcell.exporter.step_onnx.op_functions import Variant, function_for
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, conv_gru, conv_lstm
from stepcell.ops import CONV_GRU, CONV_LSTM, DOMAIN, OPS, Op, same_pads


def variants() -> list[tuple[Op, str]]:
    return [(op, variant) for op in OPS.values() for variant in op.variants]


@pytest.mark.parametrize(
    ("op", "variant"), variants(), ids=lambda value: value if isinstance(value, str) else value.name
)
def test_functions_take_and_return_what_the_table_says(op: Op, variant: str) -> None:
    reset = variant if op is CONV_GRU else "before"
    function = function_for(Variant(op.name, reset=reset, peephole=variant in ("channel", "map")), 20)
    assert (function.domain, function.name) == (DOMAIN, op.name)
    assert tuple(function.input) == op.inputs_of(variant)
    assert tuple(function.output) == op.outputs
    assert set(function.attribute) == {"pads", *op.attributes}


@pytest.mark.parametrize(
    ("cell", "variant"),
    [
        (ConvGRUCell(5, 3, (1, 3)), "before"),
        (ConvGRUCell(5, 3, reset="after"), "after"),
        (ConvLSTMCell(5, 3), "none"),
        (ConvLSTMCell(5, 3, peephole="channel"), "channel"),
        (ConvLSTMCell(5, 3, peephole=(4, 6)), "map"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torch_cells_have_weights_of_the_tables_shapes(cell: ConvGRUCell | ConvLSTMCell, variant: str) -> None:
    names = {"W_x": "weight_x", "b": "bias", "W_h": "weight_h", "W_n": "weight_n", "b_hn": "bias_n", "w_c": "peephole"}
    parameters = dict(cell.named_parameters())
    weights = cell.op.weights_of(variant)
    assert {names[weight.name] for weight in weights} == set(parameters)
    for weight in weights:
        shape = weight.shape(5, 3, cell.kernel_size, variant)
        actual = tuple(parameters[names[weight.name]].shape)
        assert len(shape) == len(actual)
        assert all(want in (None, got) for want, got in zip(shape, actual, strict=True))
    shapes = {weight.name: parameters[names[weight.name]].shape for weight in weights}
    assert cell.op.variant({"gates": "soft", "reset": variant}, shapes) == variant


def test_the_reference_arithmetic_takes_inputs_in_the_order_of_the_table() -> None:
    for function, op in ((conv_gru, CONV_GRU), (conv_lstm, CONV_LSTM)):
        arguments = list(inspect.signature(function).parameters)
        assert arguments[: 1 + len(op.states)] == ["x", *op.states]
        assert arguments.index("gates") == 1 + len(op.states) + len(op.weights)


def test_pads_keep_the_size_of_the_map() -> None:
    assert same_pads((3, 5)) == [1, 2, 1, 2]
