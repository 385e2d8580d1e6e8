"""Canonical cells: equal to the published equations and to torch's layers, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.models import ConvGRUCell, ConvLSTMCell, DenseStack, GRUCell, LSTMCell, run_sequence

STEPS = 24


def six_convolutions(cell: ConvGRUCell, x: Tensor, h: Tensor) -> Tensor:
    """ConvGRU as Ballas et al. 2016 write it: one convolution per gate and operand."""
    w_z, w_r, w_n = cell.weight_x.chunk(3)
    u_z, u_r = cell.weight_h.chunk(2)
    b_z, b_r, b_n = cell.bias.chunk(3)
    z = torch.sigmoid(F.conv2d(x, w_z, b_z, padding="same") + F.conv2d(h, u_z, padding="same"))
    r = torch.sigmoid(F.conv2d(x, w_r, b_r, padding="same") + F.conv2d(h, u_r, padding="same"))
    n = torch.tanh(F.conv2d(x, w_n, b_n, padding="same") + F.conv2d(r * h, cell.weight_n, padding="same"))
    return (1 - z) * h + z * n


@pytest.mark.parametrize("kernel", [1, 3, 5, (1, 5), (5, 1), (7, 3)])
def test_conv_gru_equals_six_convolutions_over_time_and_in_every_gradient(kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    cell = ConvGRUCell(3, 5, kernel).double()
    frames = torch.randn(STEPS, 2, 3, 9, 11, dtype=torch.float64)
    results = []
    for step in (lambda x, h: cell(x, h)[1], lambda x, h: six_convolutions(cell, x, h)):
        x, h = frames.clone().requires_grad_(), torch.randn(2, 5, 9, 11, dtype=torch.float64, generator=_generator())
        start = h.requires_grad_()
        for frame in x:
            h = step(frame, h)
        cell.zero_grad()
        (h * torch.randn(h.shape, dtype=h.dtype, generator=_generator())).sum().backward()
        # h and the gradients of x, h, W, U, C and b
        results.append([h, x.grad, start.grad, cell.weight_x.grad.clone(), cell.weight_h.grad.clone()])
        results[-1] += [cell.weight_n.grad.clone(), cell.bias.grad.clone()]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_dense_gru_equals_torch(layers: int) -> None:
    torch.manual_seed(1)
    gru = nn.GRU(7, 5, num_layers=layers).double()
    ours = DenseStack([GRUCell.from_torch(gru, layer) for layer in range(layers)])
    x = torch.randn(STEPS, 3, 7, dtype=torch.float64)
    expected, expected_h = gru(x)
    y, states = run_sequence(ours, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.stack(states), expected_h, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_dense_lstm_equals_torch(bias: bool) -> None:
    torch.manual_seed(2)
    lstm = nn.LSTM(4, 6, num_layers=2, bias=bias).double()
    ours = DenseStack([LSTMCell.from_torch(lstm, layer) for layer in range(2)])
    x = torch.randn(STEPS, 3, 4, dtype=torch.float64)
    expected, (expected_h, expected_c) = lstm(x)
    y, states = run_sequence(ours, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.stack(states[0::2]), expected_h, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.stack(states[1::2]), expected_c, rtol=0, atol=1e-14)


def test_reset_after_differs_from_before_as_the_equations_say() -> None:
    torch.manual_seed(3)
    cell = ConvGRUCell(2, 4, 3, reset="after").double()
    x, h = torch.randn(1, 2, 6, 5, dtype=torch.float64), torch.randn(1, 4, 6, 5, dtype=torch.float64)
    a = F.conv2d(x, cell.weight_x, cell.bias, padding=1)
    g = F.conv2d(h, cell.weight_h, padding=1)
    z, r = torch.sigmoid(a[:, :4] + g[:, :4]), torch.sigmoid(a[:, 4:8] + g[:, 4:])
    n = torch.tanh(a[:, 8:] + r * F.conv2d(h, cell.weight_n, cell.bias_n, padding=1))
    torch.testing.assert_close(cell(x, h)[1], (1 - z) * h + z * n)


@pytest.mark.parametrize("peephole", [None, "channel", (5, 6)])
def test_conv_lstm_with_and_without_peephole(peephole: object) -> None:
    torch.manual_seed(4)
    cell = ConvLSTMCell(3, 4, (3, 5), peephole=peephole).double()  # type: ignore[arg-type]
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    h, c = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    a = F.conv2d(x, cell.weight_x, cell.bias, padding="same") + F.conv2d(h, cell.weight_h, padding="same")
    w_i, w_f, w_o = (0, 0, 0) if cell.peephole is None else cell.peephole
    i, f = torch.sigmoid(a[:, :4] + w_i * c), torch.sigmoid(a[:, 4:8] + w_f * c)
    c_next = f * c + i * torch.tanh(a[:, 12:])
    o = torch.sigmoid(a[:, 8:12] + w_o * c_next)
    y, h_got, c_got = cell(x, h, c)
    torch.testing.assert_close(c_got, c_next)
    torch.testing.assert_close(h_got, o * torch.tanh(c_next))
    assert torch.equal(y, h_got)


def test_hard_gates_clamp_both_branches() -> None:
    torch.manual_seed(5)
    cell = ConvGRUCell(2, 3, 3, gates="hard")
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(6)  # far enough that part of the gates is clamped
    _, h = cell(torch.randn(1, 2, 16, 16), torch.zeros(1, 3, 16, 16))
    assert ((h == 1) | (h == -1)).any(), "no candidate reached the clamp"
    assert (h.abs() < 1).any()


def test_wide_state_keeps_what_a_narrow_one_loses() -> None:
    """The stall that makes float32 the default: h <- h + z (1 - h) with z = 0.001, limit 1."""
    cell = ConvGRUCell(1, 1, 1)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias.copy_(torch.tensor([-6.9068, 0.0, 20.0]))  # z = 0.001, n = 1
    cell = cell.half()
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    reached = {}
    for dtype in (torch.float32, torch.float16):
        h = torch.zeros(1, 1, 1, 1, dtype=dtype)
        for _ in range(8000):
            _, h = cell(x, h)
        reached[dtype] = h.item()
    assert reached[torch.float32] > 0.99
    assert reached[torch.float16] < 0.80


@pytest.mark.parametrize(("kernel", "reason"), [(2, "odd"), ((3, 4), "odd"), (0, "odd")])
def test_even_kernels_are_refused(kernel: int | tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ConvGRUCell(3, 4, kernel)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)
