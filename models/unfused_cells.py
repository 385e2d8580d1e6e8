"""Recurrent cells that do not fit the ops `stepcell::ConvGRU` and `stepcell::ConvLSTM`.

Gates with separable or normalised convolutions, and candidates with another activation than tanh. These
cells are traced to ordinary ONNX nodes, and their entry in the contract gives the reason.

Shapes and dtypes are those of `stepcell.models.cells`: x (N, Cx, H, W) in the compute dtype, h, c
(N, C, H, W) in the state dtype; convolutions run in the dtype of x, gates in at least float32.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import CellSpec
from stepcell.models.cells import (
    Activation,
    ConvGRUCell,
    ConvLSTMCell,
    Gates,
    KernelSize,
    activations,
    conv_gru,
    conv_lstm,
)

__all__ = [
    "ACTIVATIONS",
    "ActivatedConvGRUCell",
    "ActivatedConvLSTMCell",
    "ModuleGRUCell",
    "ModuleLSTMCell",
    "WideGroupNorm",
    "check_activation",
    "same_conv",
]

# Activation functions without parameters, by their name in torch.nn.functional.
ACTIVATIONS: dict[str, Activation] = {
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
    """Key of ACTIVATIONS for a name such as "relu", "torch.relu" or "F.relu".

    Raises:
        ValueError: there is none.
    """
    short = name.rpartition(".")[2].lower() if isinstance(name, str) else name
    if short not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return short


class ActivatedConvGRUCell(ConvGRUCell):
    """ConvGRU with reset "after" and another function than tanh for its candidate."""

    def __init__(
        self, input_size: int, hidden_size: int, kernel_size: KernelSize = 3, *, activation: str = "relu"
    ) -> None:
        super().__init__(input_size, hidden_size, kernel_size, reset="after")
        self.activation = check_activation(activation)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.weight_x, self.bias, self.weight_h, self.weight_n, self.bias_n)
        h_next = conv_gru(x, h, *weights, candidate=ACTIVATIONS[self.activation])
        return h_next.to(x.dtype), h_next

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        reason = f"the candidate is {self.activation}, the op's is tanh"
        return msgspec.structs.replace(super().cell_spec(name), op=None, reason=reason)


class ActivatedConvLSTMCell(ConvLSTMCell):
    """ConvLSTM with another function than tanh for its candidate and its output."""

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
        weights = (self.weight_x, self.bias, self.weight_h, self.peephole)
        h_next, c_next = conv_lstm(x, h, c, *weights, candidate=ACTIVATIONS[self.activation])
        return h_next.to(x.dtype), h_next, c_next

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        reason = f"candidate and output are {self.activation}, the op's are tanh"
        return msgspec.structs.replace(super().cell_spec(name), op=None, reason=reason)


class _ModuleCell(nn.Module):
    """Base of the cells whose gates are modules.

    Args:
        hidden_size: channels C of the states.
        kernel_size: kernel of the hidden convolution, for the contract.
        reason: why the cell does not fit the op, in a few words, for the contract.
        gates: "soft" or "hard", as in `ConvGRUCell`.
        x_first: whether x comes before h in the concatenation.
    """

    states: tuple[str, ...]

    def __init__(
        self, hidden_size: int, kernel_size: tuple[int, int], reason: str, gates: Gates, x_first: bool
    ) -> None:
        super().__init__()
        if gates not in ("soft", "hard"):
            raise ValueError(f"gates: expected 'soft' or 'hard', got {gates!r}")
        self.hidden_size, self.kernel_size, self.reason = hidden_size, kernel_size, reason
        self.gates: Gates = gates
        self.x_first = x_first
        self.sigmoid, self.tanh = activations(gates)

    def _concat(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat([x, h] if self.x_first else [h, x], dim=1)

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        return CellSpec(
            name=name,
            op=None,
            hidden=self.hidden_size,
            kernel=self.kernel_size,
            gates=self.gates,
            reason=self.reason,
        )


class ModuleGRUCell(_ModuleCell):
    """GRU whose gates are arbitrary modules: z, r = conv_zr([x, h]), n = act(conv_n([x, r . h])).

    h' = (1 - z) . h + z . n.

    Args:
        conv_zr: maps Cx + C to 2C channels, z before r.
        conv_n: maps Cx + C to C channels.
        candidate: "tanh" (hard or soft as the gates) or "relu".
    """

    states = ("h",)

    def __init__(
        self,
        hidden_size: int,
        conv_zr: nn.Module,
        conv_n: nn.Module,
        reason: str,
        *,
        kernel_size: tuple[int, int] = (3, 3),
        gates: Gates = "soft",
        x_first: bool = True,
        candidate: Literal["tanh", "relu"] = "tanh",
    ) -> None:
        super().__init__(hidden_size, kernel_size, reason, gates, x_first)
        self.conv_zr, self.conv_n = conv_zr, conv_n
        self.candidate: Activation = torch.relu if candidate == "relu" else self.tanh

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(h.dtype, torch.float32)
        state = h.to(wide)
        z, r = torch.split(self.conv_zr(self._concat(x, h.to(x.dtype))).to(wide), self.hidden_size, dim=1)
        z, r = self.sigmoid(z), self.sigmoid(r)
        n = self.candidate(self.conv_n(self._concat(x, (r * state).to(x.dtype))).to(wide))
        h_next = (state + z * (n - state)).to(h.dtype)
        return h_next.to(x.dtype), h_next


class ModuleLSTMCell(_ModuleCell):
    """LSTM whose gates are arbitrary modules: i, f, o, g = joint([x, map_h(h)]) or x + map_h(h).

    c' = f . c + i . tanh(g), h' = o . tanh(c').

    Args:
        joint: maps the concatenation to 4C channels; None if x and map_h(h) are the 4C pre-activations
            themselves, which are added.
        map_h: applied to h first.
        order: order of the gates along the channels.
    """

    states = ("h", "c")

    def __init__(
        self,
        hidden_size: int,
        reason: str,
        *,
        joint: nn.Module | None = None,
        map_h: nn.Module | None = None,
        kernel_size: tuple[int, int] = (3, 3),
        gates: Gates = "soft",
        x_first: bool = True,
        order: str = "ifog",
    ) -> None:
        super().__init__(hidden_size, kernel_size, reason, gates, x_first)
        self.joint, self.map_h, self.order = joint, map_h, order

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(c.dtype, torch.float32)
        narrow = h.to(x.dtype)
        if self.map_h is not None:
            narrow = self.map_h(narrow)
        a = x + narrow if self.joint is None else self.joint(self._concat(x, narrow))
        gate = dict(zip(self.order, torch.split(a.to(wide), self.hidden_size, dim=1), strict=True))
        i, f, o = (self.sigmoid(gate[name]) for name in "ifo")
        c_next = f * c.to(wide) + i * self.tanh(gate["g"])
        h_next = o * self.tanh(c_next)
        return h_next.to(x.dtype), h_next.to(h.dtype), c_next.to(c.dtype)


class WideGroupNorm(nn.GroupNorm):
    """GroupNorm in at least float32: sums over a whole map overflow or lose precision in float16."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)


def same_conv(inputs: int, outputs: int, kernel: int, *, groups: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size of the map.

    Raises:
        ValueError: an even kernel.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel size: expected an odd one, which keeps the size of the map, got {kernel}")
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
