"""Cell stacks, the step-model protocol and the sequence helpers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepcell.models import (
    CellStack,
    ConvGRUCell,
    ConvLSTMCell,
    batch_to_time,
    conv_gru_stack,
    initial_states,
    is_step_module,
    run_sequence,
    seq_wise,
    time_to_batch,
)


def test_stack_of_different_cells_names_and_sizes_its_states() -> None:
    stack = CellStack([ConvGRUCell(3, 8, 3), ConvLSTMCell(8, 4, (1, 5)), ConvGRUCell(4, 6, 5)])
    assert is_step_module(stack)
    assert [state.name for state in stack.states] == ["h0", "h1", "c1", "h2"]
    x = torch.randn(2, 3, 10, 12)
    states = initial_states(stack, x)
    assert [tuple(state.shape) for state in states] == [(2, n, 10, 12) for n in (8, 4, 4, 6)]
    y, *new = stack(x, *states)
    assert torch.equal(y, new[-1])
    assert [tuple(state.shape) for state in new] == [tuple(state.shape) for state in states]


def test_peepholes_with_a_weight_per_position_fix_the_size_of_the_map() -> None:
    stack = CellStack([ConvGRUCell(3, 8), ConvLSTMCell(8, 4, peephole=(5, 6))], names=["a", "b", "c"])
    assert [spec.shape for spec in stack.inputs] == [("batch", 3, 5, 6)]
    assert [(state.name, state.shape[1:]) for state in stack.states] == [
        ("a", (8, 5, 6)),
        ("b", (4, 5, 6)),
        ("c", (4, 5, 6)),
    ]
    assert CellStack([ConvLSTMCell(8, 4, peephole="channel")]).inputs[0].shape == ("batch", 8, "height", "width")
    with pytest.raises(ValueError, match=r"one map size, got \(5, 6\) and \(7, 6\)"):
        CellStack([ConvLSTMCell(3, 4, peephole=(7, 6)), ConvLSTMCell(4, 4, peephole=(5, 6))])


def test_many_layers_are_numbered_so_that_they_sort() -> None:
    names = [state.name for state in conv_gru_stack(2, [2] * 12, [1] * 12).states]
    assert names[0] == "h00"
    assert names == sorted(names)


def test_stack_refuses_cells_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expects 7 channels, got 8"):
        CellStack([ConvGRUCell(3, 8), ConvGRUCell(7, 8)])


@pytest.mark.parametrize("layout", ["TBCHW", "BTCHW"])
def test_time_and_batch_fold_and_unfold(layout: str) -> None:
    x = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    flat, batch = time_to_batch(x, layout)  # type: ignore[arg-type]
    assert flat.shape == (6, 4, 5, 6)
    assert torch.equal(batch_to_time(flat, batch, layout), x)  # type: ignore[arg-type]
    first = x[0, 1] if layout == "TBCHW" else x[1, 0]
    assert torch.equal(flat[1], first), "time is the slow axis"


def test_seq_wise_equals_frame_by_frame() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(5, 2, 3, 6, 7)
    torch.testing.assert_close(seq_wise(layer)(x), torch.stack([layer(frame) for frame in x]))


def test_run_sequence_continues_from_given_states() -> None:
    torch.manual_seed(0)
    stack, x = conv_gru_stack(3, [4, 5], [3, 1]), torch.randn(8, 2, 3, 6, 7)
    whole, end = run_sequence(stack, x)
    first, middle = run_sequence(stack, x[:3])
    second, resumed = run_sequence(stack, x[3:], middle)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(resumed, end)
