"""What published stacks need beyond the canonical ones: other activations, a fixed map, own state names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import CellSpec
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, KernelSize
from stepcell.models.stack import Cell, CellStack

__all__ = ["ACTIVATIONS", "ActivatedConvGRUCell", "ActivatedConvLSTMCell", "MapStack", "check_activation"]

# Without parameters, as torch.nn.functional names them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}


def check_activation(name: str) -> str:
    """The name of one of ACTIVATIONS, also from `torch.relu` or `F.relu`."""
    short = name.rpartition(".")[2].lower() if isinstance(name, str) else name
    if short not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return short


class ActivatedConvGRUCell(ConvGRUCell):
    """A ConvGRU with reset "after" and another function than tanh for its candidate."""

    def __init__(
        self, input_size: int, hidden_size: int, kernel_size: KernelSize = 3, *, activation: str = "relu"
    ) -> None:
        super().__init__(input_size, hidden_size, kernel_size, reset="after")
        self.activation = check_activation(activation)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(h.dtype, torch.float32)
        narrow, state = h.to(x.dtype), h.to(wide)
        a_z, a_r, a_n = _same(x, self.weight_x, self.bias).to(wide).chunk(3, dim=1)
        g_z, g_r = _same(narrow, self.weight_h).to(wide).chunk(2, dim=1)
        recurrent = torch.sigmoid(a_r + g_r) * _same(narrow, self.weight_n, self.bias_n).to(wide)
        n = ACTIVATIONS[self.activation](a_n + recurrent)
        h_next = (state + torch.sigmoid(a_z + g_z) * (n - state)).to(h.dtype)
        return h_next.to(x.dtype), h_next

    def cell_spec(self, name: str) -> CellSpec:
        """How the contract lists this cell."""
        reason = f"the candidate is {self.activation}, the op's is tanh"
        return msgspec.structs.replace(super().cell_spec(name), op=None, reason=reason)


class ActivatedConvLSTMCell(ConvLSTMCell):
    """A ConvLSTM with another function than tanh for its candidate and its output."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: KernelSize = 3,
        *,
        peephole: Literal["channel"] | tuple[int, int] | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__(input_size, hidden_size, kernel_size, peephole=peephole)
        self.activation = check_activation(activation)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(h.dtype, torch.float32)
        activation, state = ACTIVATIONS[self.activation], c.to(wide)
        a = (_same(x, self.weight_x, self.bias) + _same(h.to(x.dtype), self.weight_h)).to(wide)
        a_i, a_f, a_o, a_g = a.chunk(4, dim=1)
        if self.peephole is not None:
            w_i, w_f, _ = self.peephole.to(wide)
            a_i, a_f = a_i + w_i * state, a_f + w_f * state
        c_next = torch.sigmoid(a_f) * state + torch.sigmoid(a_i) * activation(a_g)
        if self.peephole is not None:
            a_o = a_o + self.peephole[2].to(wide) * c_next
        h_next = (torch.sigmoid(a_o) * activation(c_next)).to(h.dtype)
        return h_next.to(x.dtype), h_next, c_next.to(c.dtype)

    def cell_spec(self, name: str) -> CellSpec:
        """How the contract lists this cell."""
        reason = f"candidate and output are {self.activation}, the op's are tanh"
        return msgspec.structs.replace(super().cell_spec(name), op=None, reason=reason)


class MapStack(CellStack):
    """A CellStack whose weights may fix the size of the map, with numbered or given state names.

    Args:
        cells: from the input to the output.
        map_size: (height, width) that peepholes per position are tied to; None: any size.
        names: of the states, from the lowest cell up; h0, c0, h1, ... by default.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        map_size: tuple[int, int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(cells, numbered=True)
        shape = map_size or self.map_shape
        replace = msgspec.structs.replace
        self.inputs = [replace(spec, shape=(*spec.shape[:2], *shape)) for spec in self.inputs]
        self.outputs = [replace(spec, shape=(*spec.shape[:2], *shape)) for spec in self.outputs]
        self.states = [
            replace(state, name=name, shape=(*state.shape[:2], *shape))
            for state, name in zip(self.states, names or [state.name for state in self.states], strict=True)
        ]


def _same(x: Tensor, weight: Tensor, bias: nn.Parameter | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
