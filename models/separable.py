"""Recurrent cells that are not one plain convolution per gate: ordinary torch operations.

Separable convolutions, normalisation inside the gates and other candidate activations do not fit
`stepcell::ConvGRU` and `stepcell::ConvLSTM`; these cells trace to ordinary ONNX nodes and say why.

Shapes and dtypes as in `stepcell.models.cells`: x (N, Cx, H, W) in the compute dtype, h, c (N, C, H, W)
in the state dtype; convolutions run in the dtype of x, the gates in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import CellSpec, StateSpec, TensorSpec
from stepcell.dims import Dim
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, Gates

__all__ = [
    "CellModel",
    "ModuleGRUCell",
    "ModuleLSTMCell",
    "WideGroupNorm",
    "same_conv",
]

Activation = Callable[[Tensor], Tensor]


def same_conv(inputs: int, outputs: int, kernel: int, *, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the map; an odd kernel is asked for."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel size: an odd one keeps the size of the map, got {kernel}")
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


class WideGroupNorm(nn.GroupNorm):
    """GroupNorm in at least float32: sums over a whole map overflow or lose digits in float16."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)


class _ModuleCell(nn.Module):
    """What both cells share.

    Args:
        hidden_size: channels C of the states.
        kernel_size: what the contract says about the hidden convolution.
        reason: why the cell is not the fused op, in a few words.
        gates: "soft" or "hard", as in `ConvGRUCell`.
        x_first: order of the concatenation of x and h.
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
        soft = gates == "soft"
        self.sigmoid: Activation = torch.sigmoid if soft else lambda x: (0.5 * x + 0.5).clamp(0, 1)
        self.tanh: Activation = torch.tanh if soft else lambda x: x.clamp(-1, 1)

    def _concat(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat([x, h] if self.x_first else [h, x], dim=1)

    def cell_spec(self, name: str) -> CellSpec:
        """How the contract lists this cell."""
        return CellSpec(
            name=name,
            op=None,
            hidden=self.hidden_size,
            kernel=self.kernel_size,
            gates=self.gates,
            reason=self.reason,
        )


class ModuleGRUCell(_ModuleCell):
    """GRU whose gates are any modules: z, r = conv_zr([x, h]), n = act(conv_n([x, r . h])).

    h' = (1 - z) . h + z . n.

    Args:
        conv_zr: (Cx + C) to 2C channels, z before r.
        conv_n: (Cx + C) to C channels.
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
    """LSTM whose gates are any modules: i, f, o, g = joint([map_x(x), map_h(h)]) or map_x(x) + map_h(h).

    c' = f . c + i . tanh(g), h' = o . tanh(c').

    Args:
        joint: to 4C channels; None: x and map_h(h) already are the 4C pre-activations, and are added.
        map_h: applied to h before that.
        order: of the gates along the channels.
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


class CellModel(nn.Module):
    """One cell as a step model: x (batch, Cx, height, width) -> y, the hidden state in x's dtype.

    Args:
        cell: with `hidden_size` and `states`.
        input_size: channels of x.
        front: applied to x before the cell.
        map_size: height and width of the states, where `front` changes them.
    """

    def __init__(
        self,
        cell: ConvGRUCell | ConvLSTMCell | ModuleGRUCell | ModuleLSTMCell,
        input_size: int,
        *,
        front: nn.Module | None = None,
        map_size: Sequence[Dim] = ("height", "width"),
    ) -> None:
        super().__init__()
        self.front, self.cell = front, cell
        shape = ("batch", cell.hidden_size, *map_size)
        self.inputs = [TensorSpec(name="x", shape=("batch", input_size, "height", "width"), layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=shape, layout="NCHW")]
        self.states = [StateSpec(name=name, shape=shape) for name in cell.states]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self.cell(x if self.front is None else self.front(x), *states)
        return results
