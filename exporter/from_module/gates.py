"""Canonical cells from gates: each gate is a sum of terms over x, over h, or over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, Gates, Reset

__all__ = ["Gate", "Term", "gru_cell", "lstm_cell"]


@dataclass(frozen=True)
class Term:
    """weight_x * x + weight_h * h + bias, where what is None is left out.

    weight_x (C, Cx, kh, kw), weight_h (C, C, kh, kw), bias (C).
    """

    weight_x: Tensor | None
    weight_h: Tensor | None
    bias: Tensor | None = None


Gate = Sequence[Term]


def gru_cell(z: Gate, r: Gate, n: Gate, *, reset: Reset, keeps_old: bool, gates: Gates = "soft") -> ConvGRUCell:
    """A ConvGRU cell with these gates; `keeps_old`: h' = z . h + (1 - z) . n, so z is negated.

    With reset "after" the candidate's last term is the one over h, and its bias lies inside the product.
    """
    inputs, hidden, kernel = _sizes(z, r, n)
    sign = -1 if keeps_old else 1
    cell = ConvGRUCell(inputs, hidden, kernel, reset=reset, gates=gates).double()
    n_bias = n[:-1] if reset == "after" else n
    tensors = {
        "weight_x": torch.cat([sign * _x(z, kernel), _x(r, kernel), _x(n, kernel)]),
        "weight_h": torch.cat([sign * _h(z, kernel), _h(r, kernel)]),
        "weight_n": _h(n, kernel),
        "bias": torch.cat([sign * _bias(z, hidden), _bias(r, hidden), _bias(n_bias, hidden)]),
    }
    if reset == "after":
        tensors["bias_n"] = _bias(n[-1:], hidden)
    cell.load_state_dict(tensors)
    return cell


def lstm_cell(
    i: Gate, f: Gate, o: Gate, g: Gate, *, peephole: Tensor | None = None, gates: Gates = "soft"
) -> ConvLSTMCell:
    """A ConvLSTM cell with these gates; peephole (3, C, 1, 1) or (3, C, H, W), order i, f, o."""
    inputs, hidden, kernel = _sizes(i, f, o, g)
    size: Literal["channel"] | tuple[int, int] | None = None
    if peephole is not None:
        size = (peephole.shape[2], peephole.shape[3])
    cell = ConvLSTMCell(inputs, hidden, kernel, peephole=size, gates=gates).double()
    order = (i, f, o, g)
    tensors = {
        "weight_x": torch.cat([_x(gate, kernel) for gate in order]),
        "weight_h": torch.cat([_h(gate, kernel) for gate in order]),
        "bias": torch.cat([_bias(gate, hidden) for gate in order]),
    }
    if peephole is not None:
        tensors["peephole"] = peephole
    cell.load_state_dict(tensors)
    return cell


def _sizes(*gates: Gate) -> tuple[int, int, tuple[int, int]]:
    over_x = [term.weight_x for gate in gates for term in gate if term.weight_x is not None]
    over_h = [term.weight_h for gate in gates for term in gate if term.weight_h is not None]
    kernel = tuple(max(weight.shape[axis] for weight in over_x + over_h) for axis in (2, 3))
    return over_x[0].shape[1], over_h[0].shape[0], (kernel[0], kernel[1])


def _x(gate: Gate, kernel: tuple[int, int]) -> Tensor:
    return _centred([term.weight_x for term in gate if term.weight_x is not None], kernel)


def _h(gate: Gate, kernel: tuple[int, int]) -> Tensor:
    return _centred([term.weight_h for term in gate if term.weight_h is not None], kernel)


def _centred(weights: Sequence[Tensor], kernel: tuple[int, int]) -> Tensor:
    """Their sum; a smaller kernel gets a border of zeros, which changes nothing."""
    total = weights[0].new_zeros((*weights[0].shape[:2], *kernel), dtype=torch.float64)
    for weight in weights:
        top, left = (kernel[0] - weight.shape[2]) // 2, (kernel[1] - weight.shape[3]) // 2
        total = total + F.pad(weight.detach().double(), (left, left, top, top))
    return total


def _bias(gate: Gate, hidden: int) -> Tensor:
    total = torch.zeros(hidden, dtype=torch.float64)
    for term in gate:
        if term.bias is not None:
            total = total + term.bias.detach().double()
    return total
