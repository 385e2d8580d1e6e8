"""Modules that are replaced before tracing: registered cells, recurrent layers, parametrized weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from stepcell.contract import CellSpec
from stepcell.errors import ExportError, ParityError
from stepcell.exporter import export_onnx, lift_states, register_cell
from stepcell.exporter.from_module import replacements
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.models import ConvGRUCell

C = 4
SHAPE = {"x": (1, 3, 9, 8)}


class Plain(nn.Module):
    """A 1x1 ConvGRU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_rz, self.conv_n = nn.Conv2d(3 + C, 2 * C, 1), nn.Conv2d(3 + C, C, 1)

    def apply_layer(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        r, z = torch.sigmoid(self.apply_layer(self.conv_rz, torch.cat([h, x], dim=1))).chunk(2, dim=1)
        return z * h + (1 - z) * torch.tanh(self.apply_layer(self.conv_n, torch.cat([r * h, x], dim=1)))


class Einsum(Plain):
    """The same without a convolution in its graph."""

    def apply_layer(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        assert layer.bias is not None
        return torch.einsum("oihw,nihw->nohw", layer.weight.expand(-1, -1, *x.shape[2:]), x) + layer.bias[:, None, None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Einsum()

    def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return h.mean(1, keepdim=True), h


def cells(net: nn.Module, path: Path, shapes: dict[str, Any] = SHAPE) -> tuple[CellSpec, ...]:
    model = lift_states(net, shapes)
    return export_onnx(model, path / "m.onnx", precision="float32", shapes=model.example_shapes).cells


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    replacements._registered.clear()


def to_plain(cell: Einsum) -> Plain:
    plain = Plain()
    plain.load_state_dict(cell.state_dict())
    return plain


def test_without_a_replacement_the_cell_is_left(tmp_path: Path) -> None:
    (cell,) = cells(Net(), tmp_path)
    assert cell.op is None
    assert "Einsum between" in (cell.reason or "")


def test_a_registered_cell_is_replaced_and_recognised(tmp_path: Path) -> None:
    register_cell(Einsum, to_plain)
    net = Net()
    assert [(cell.name, cell.op) for cell in cells(net, tmp_path)] == [("cell", "stepcell::ConvGRU")]
    assert type(net.cell) is Einsum


def test_a_replacement_may_hold_a_cell_of_stepcell(tmp_path: Path) -> None:
    class Canonical(nn.Module):
        def __init__(self, cell: Einsum) -> None:
            super().__init__()
            self.inner = ConvGRUCell(3, C, 1)
            (r, z), n = cell.conv_rz.weight.chunk(2), cell.conv_n.weight
            (b_r, b_z), b_n = cell.conv_rz.bias.chunk(2), cell.conv_n.bias  # type: ignore[union-attr]
            self.inner.weight_x.data = torch.cat([-z[:, C:], r[:, C:], n[:, C:]])
            self.inner.weight_h.data = torch.cat([-z[:, :C], r[:, :C]])
            self.inner.weight_n.data, self.inner.bias.data = n[:, :C], torch.cat([-b_z, b_r, b_n])

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
            return self.inner(x, h)[0]  # type: ignore[no-any-return]

    register_cell(Einsum, Canonical)
    assert [(cell.name, cell.op) for cell in cells(Net(), tmp_path)] == [("cell.inner", "stepcell::ConvGRU")]


def test_a_wrong_replacement_is_an_error() -> None:
    def wrong(cell: Einsum) -> Plain:
        plain = to_plain(cell)
        plain.conv_rz.weight.data = plain.conv_rz.weight.data.flip(0)
        return plain

    register_cell(Einsum, wrong)
    with pytest.raises((ExportError, ParityError), match=r"something else than|differs from the original module"):
        lift_states(Net(), SHAPE)


def test_a_replacement_that_is_no_module() -> None:
    register_cell(Einsum, lambda cell: cell.state_dict())
    with pytest.raises(
        ExportError, match=r"register_cell\(Einsum\): expected a torch module from convert, got Ordered"
    ):
        lift_states(Net(), SHAPE)


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm])
def test_weights_that_are_computed_at_every_call_become_plain(norm: Any) -> None:
    torch.manual_seed(0)
    layer = norm(nn.Conv2d(3, 4, 3)).eval()
    x = torch.rand(1, 3, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        plain = replacements.replace_modules(copy.deepcopy(layer))
        assert "weight" in dict(plain.named_parameters())
        assert torch.allclose(plain(x), expected, atol=1e-6)
        assert torch.equal(layer(x), expected), "the original works as before"


class Clips(nn.Module):
    """A layer that runs over a few frames inside the step."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(x, state)
        return y[:, -1], state


@pytest.mark.parametrize(
    ("rnn", "op"),
    [
        (nn.GRU(3, C, batch_first=True, bias=False), "stepcell::ConvGRU"),
        (nn.LSTM(3, C, batch_first=True), "stepcell::ConvLSTM"),
        (nn.RNN(3, C, batch_first=True), None),
    ],
)
def test_a_layer_over_a_short_sequence_is_unrolled(rnn: nn.Module, op: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = cells(Clips(rnn), tmp_path, {"x": (2, 3, 3)})
    assert [(cell.name, cell.op) for cell in found] == (
        [(f"rnn.cells.0{suffix}", op) for suffix in ("", "_2", "_3")] if op else []
    )


@pytest.mark.parametrize(
    ("rnn", "frames", "message"),
    [
        (nn.GRU(3, C, batch_first=True), 40, "runs over a sequence of 40 inside the step"),
        (nn.GRU(3, C, batch_first=True, bidirectional=True), 2, "rnn is bidirectional and carries a state"),
    ],
)
def test_other_layers_are_refused(rnn: nn.Module, frames: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        cells(Clips(rnn), tmp_path, {"x": (2, frames, 3)})


def test_a_float32_state_of_a_layer_is_never_rounded_to_float16(tmp_path: Path) -> None:
    """All layers share one tensor; updates of 1e-4 per step are lost in float16."""
    net = Clips(nn.GRU(3, C, num_layers=2, batch_first=True))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(std=1e-6)
            if "bias_ih" in name:
                parameter[C : 2 * C], parameter[2 * C :] = 8.0, 3.0
    model = lift_states(net, {"x": (1, 1, 3)})
    contract = export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes)
    assert [(state.name, state.dtype) for state in contract.states] == [("h", "float32")]
    session = OnnxSession((tmp_path / "m.onnx").read_bytes(), "m.onnx")
    state = np.zeros((2, 1, C), np.float32)
    for _ in range(4000):
        state = session({"x": np.zeros((1, 1, 3), np.float16), "state_in.h": state})["state_out.h"]
    expected = np.tanh(3.0) * (1 - (1 / (1 + np.exp(-8.0))) ** 4000)
    assert np.abs(state[0] - expected).max() < 2e-3
