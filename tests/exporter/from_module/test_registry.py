"""Adapters that a user writes: used where they are right, refused where they are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepcell.errors import ExportError
from stepcell.exporter.from_module import adopt, register_cell
from stepcell.exporter.from_module.registry import _ADAPTERS
from stepcell.models import ConvGRUCell

C = 4
SHAPE = {"x": (1, 3, 9, 8)}


class Einsum(nn.Module):
    """A 1x1 ConvGRU that never calls a convolution, so nothing can be read off its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_rz, self.conv_n = nn.Conv2d(3 + C, 2 * C, 1), nn.Conv2d(3 + C, C, 1)

    @staticmethod
    def apply_layer(layer: nn.Conv2d, x: Tensor) -> Tensor:
        assert layer.bias is not None
        return torch.einsum("oihw,nihw->nohw", layer.weight.expand(-1, -1, *x.shape[2:]), x) + layer.bias[:, None, None]

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        r, z = torch.sigmoid(self.apply_layer(self.conv_rz, torch.cat([h, x], dim=1))).chunk(2, dim=1)
        return z * h + (1 - z) * torch.tanh(self.apply_layer(self.conv_n, torch.cat([r * h, x], dim=1)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Einsum()

    def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return h.mean(1, keepdim=True), h


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    _ADAPTERS.clear()


RIGHT: dict[str, Any] = {"gates": {"rz": "conv_rz", "n": "conv_n"}, "concat": "hx", "update": "keeps"}
WRONG = {
    "gate order": {"gates": {"zr": "conv_rz", "n": "conv_n"}},
    "concat order": {"concat": "xh"},
    "update rule": {"update": "takes"},
    "activations": {"activations": "hard"},
}


def test_without_an_adapter_the_cell_is_left() -> None:
    assert all(cell.spec.op is None for cell in adopt(Net(), SHAPE).cells)


def test_an_adapter_names_gates_order_and_rule() -> None:
    register_cell(Einsum, **RIGHT)
    model = adopt(Net(), SHAPE)
    assert [(cell.path, cell.spec.op) for cell in model.cells] == [("cell", "stepcell::ConvGRU")]


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_adapter_is_an_error(mistake: str) -> None:
    register_cell(Einsum, **{**RIGHT, **WRONG[mistake]})
    with pytest.raises(ExportError, match="cell: Einsum computes something else than its adapter says"):
        adopt(Net(), SHAPE)


def test_an_adapter_may_be_a_function() -> None:
    def convert(cell: nn.Module) -> ConvGRUCell:
        assert isinstance(cell, Einsum)
        canonical = ConvGRUCell(3, C, 1)
        (r, z), n = cell.conv_rz.weight.chunk(2), cell.conv_n.weight
        (b_r, b_z), b_n = cell.conv_rz.bias.chunk(2), cell.conv_n.bias  # type: ignore[union-attr]
        canonical.weight_x.data = torch.cat([-z[:, C:], r[:, C:], n[:, C:]])
        canonical.weight_h.data = torch.cat([-z[:, :C], r[:, :C]])
        canonical.weight_n.data, canonical.bias.data = n[:, :C], torch.cat([-b_z, b_r, b_n])
        return canonical

    register_cell(Einsum, convert)
    assert [cell.spec.op for cell in adopt(Net(), SHAPE).cells] == ["stepcell::ConvGRU"]


class SumsLSTM(nn.Module):
    """One layer over x and one over h, gates f, i, g, o."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h = nn.Conv2d(3, 4 * C, 3, padding=1), nn.Conv2d(C, 4 * C, 3, padding=1)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state or (x.new_zeros(x.shape[0], C, *x.shape[2:]),) * 2
        f, i, g, o = (self.x2h(x) + self.h2h(h)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class LSTMNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = SumsLSTM()

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.cell(x, state)


def test_a_pair_of_layers_is_added() -> None:
    register_cell(SumsLSTM, op="ConvLSTM", gates={"figo": ("x2h", "h2h")})
    assert [cell.spec.op for cell in adopt(LSTMNet(), SHAPE).cells] == ["stepcell::ConvLSTM"]
    register_cell(SumsLSTM, op="ConvLSTM", gates={"ifgo": ("x2h", "h2h")})
    with pytest.raises(ExportError, match="SumsLSTM computes something else"):
        adopt(LSTMNet(), SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gates": {"zr": "conv_rz"}}, "expected each of z, r, n once, got zr"),
        ({}, "got none"),
        ({**RIGHT, "gates": {"zr": "conv_rz", "n": "nothing"}}, "the cell has no layer 'nothing'"),
        ({**RIGHT, "gates": {"zr": "conv_rz", "n": ""}}, "'' is no 2-D convolution or linear layer"),
        ({**RIGHT, "op": "ConvLSTM"}, "expected each of i, f, o, g once"),
    ],
)
def test_an_adapter_that_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    def use() -> None:
        register_cell(Einsum, **arguments)
        adopt(Net(), SHAPE)

    with pytest.raises(ExportError) as caught:
        use()
    assert message in str(caught.value)
