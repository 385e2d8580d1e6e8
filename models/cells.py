"""Canonical cells: ConvGRU and ConvLSTM in the one form that every variant is converted to at export.

`*` is a 2-D cross-correlation with zero "same" padding; `stepcell.ops` has the order of gates and weights.
The functions are the reference arithmetic. The modules hold the weights; during an export they add one
`stepcell::ConvGRU` or `stepcell::ConvLSTM` node to the graph instead of the arithmetic.

Shapes: x (N, Cx, H, W) in the compute dtype; h, c (N, C, H, W) in the state dtype, which may be
wider. Gates are computed in at least float32. Gradients are those of autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import CellSpec
from stepcell.ops import CONV_GRU, CONV_LSTM, GATES, RESETS, VERSION, Gates, Op, Reset, same_pads

__all__ = [
    "Activation",
    "ConvGRUCell",
    "ConvLSTMCell",
    "Gates",
    "Reset",
    "activations",
    "conv_gru",
    "conv_lstm",
    "size_pair",
]

Activation = Callable[[Tensor], Tensor]
KernelSize = int | Sequence[int]

# Parameter that holds each weight of an op.
_PARAMETERS = {
    "W_x": "weight_x",
    "b": "bias",
    "W_h": "weight_h",
    "W_n": "weight_n",
    "b_hn": "bias_n",
    "w_c": "peephole",
}


def conv_gru(
    x: Tensor,
    h: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    weight_h: Tensor,
    weight_n: Tensor,
    bias_n: Tensor | None = None,
    gates: Gates = "soft",
    candidate: Activation | None = None,
) -> Tensor:
    """One ConvGRU step; returns h' in the dtype of h.

    a = W_x * x + b                       W_x (3C, Cx, kh, kw), b (3C)
    g = W_h * h                           W_h (2C, C, kh, kw)
    z = sigmoid(a_z + g_z)                update gate
    r = sigmoid(a_r + g_r)                reset gate
    n = tanh(a_n + W_n * (r . h))         reset "before": Ballas et al. 2016, arXiv 1511.06432
    n = tanh(a_n + r . (W_n * h + b_n))   reset "after": with bias_n (C); cuDNN, torch.nn.GRU
    h' = (1 - z) . h + z . n

    Args:
        candidate: function in place of the tanh.
    """
    sigmoid, tanh = activations(gates)
    tanh = candidate or tanh
    compute, wide = x.dtype, torch.promote_types(h.dtype, torch.float32)
    narrow, state = h.to(compute), h.to(wide)
    hidden = weight_n.shape[0]

    a = _same(x, weight_x, bias).to(wide)
    a_z, a_r, a_n = torch.split(a, hidden, dim=1)
    g_z, g_r = torch.split(_same(narrow, weight_h).to(wide), hidden, dim=1)
    z = sigmoid(a_z + g_z)
    r = sigmoid(a_r + g_r)
    if bias_n is None:
        n = tanh(a_n + _same((r * state).to(compute), weight_n).to(wide))
    else:
        n = tanh(a_n + r * _same(narrow, weight_n, bias_n).to(wide))
    return (state + z * (n - state)).to(h.dtype)


def conv_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    weight_h: Tensor,
    peephole: Tensor | None = None,
    gates: Gates = "soft",
    candidate: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """One ConvLSTM step (Shi et al. 2015, arXiv 1506.04214); returns h', c' in the dtypes of h, c.

    a = W_x * x + W_h * h + b             W_x (4C, Cx, kh, kw), W_h (4C, C, kh, kw), b (4C)
    i = sigmoid(a_i + w_i . c)            peephole w (3, C, 1, 1) or (3, C, H, W), order i, f, o
    f = sigmoid(a_f + w_f . c)
    c' = f . c + i . tanh(a_g)
    o = sigmoid(a_o + w_o . c')
    h' = o . tanh(c')

    Args:
        candidate: function in place of both tanh.
    """
    sigmoid, tanh = activations(gates)
    tanh = candidate or tanh
    wide = torch.promote_types(h.dtype, torch.float32)
    state = c.to(wide)
    a = (_same(x, weight_x, bias) + _same(h.to(x.dtype), weight_h)).to(wide)
    a_i, a_f, a_o, a_g = torch.split(a, weight_h.shape[1], dim=1)
    if peephole is not None:
        w_i, w_f, w_o = peephole.to(wide)
        a_i, a_f = a_i + w_i * state, a_f + w_f * state
    c_next = sigmoid(a_f) * state + sigmoid(a_i) * tanh(a_g)
    if peephole is not None:
        a_o = a_o + w_o * c_next
    return (sigmoid(a_o) * tanh(c_next)).to(h.dtype), c_next.to(c.dtype)


class _Cell(nn.Module):
    """Base of both cells: sizes, odd kernels, uniform initialisation."""

    op: ClassVar[Op]
    states: ClassVar[tuple[str, ...]]

    def __init__(self, input_size: int, hidden_size: int, kernel_size: KernelSize, gates: Gates) -> None:
        super().__init__()
        self.input_size: int = input_size
        self.hidden_size: int = hidden_size
        self.kernel_size: tuple[int, int] = size_pair(kernel_size)
        if any(k < 1 or k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size: expected odd positive sizes, got {self.kernel_size}")
        if gates not in GATES:
            raise ValueError(f"gates: expected 'soft' or 'hard', got {gates!r}")
        self.gates: Gates = gates

    def _weight(self, outputs: int, inputs: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(outputs, inputs, *self.kernel_size))

    def reset_parameters(self) -> None:
        """Initialise as torch's recurrent layers do: uniform in +-1/sqrt(fan-in of the hidden convolution)."""
        bound = (self.hidden_size * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _onnx_node(self, x: Tensor, *states: Tensor, **attributes: str) -> tuple[Tensor, ...]:
        """Add the op's node to the graph; returns y and the new states."""
        weights = [getattr(self, _PARAMETERS[weight.name]) for weight in self.op.weights]
        *new_states, y = torch.onnx.ops.symbolic_multi_out(
            self.op.qualified_name,
            (x, *states, *(weight for weight in weights if weight is not None)),
            {"pads": same_pads(self.kernel_size), "gates": self.gates, **attributes},
            dtypes=(*(state.dtype for state in states), x.dtype),
            shapes=(*(state.shape for state in states), states[0].shape),
            version=VERSION,
        )
        return y, *new_states

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        return CellSpec(
            name=name,
            op=self.op.qualified_name,
            hidden=self.hidden_size,
            kernel=self.kernel_size,
            gates=self.gates,
        )

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, kernel_size={self.kernel_size}, gates={self.gates!r}"


class ConvGRUCell(_Cell):
    """One ConvGRU step in the canonical form of `conv_gru`.

    Args:
        input_size: channels of x.
        hidden_size: channels of the hidden state.
        kernel_size: odd, one number or (height, width); 1 is a dense GRU at every pixel.
        reset: "before" (Ballas et al. 2016) or "after" (cuDNN) the hidden convolution.
        gates: "soft" (sigmoid, tanh) or "hard" (clamp(x/2 + 1/2, 0, 1), clamp(x, -1, 1)).

    Raises:
        ValueError: an even kernel size or an unknown variant.
    """

    op = CONV_GRU
    states: ClassVar[tuple[str, ...]] = CONV_GRU.states

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: KernelSize = 3,
        *,
        reset: Reset = "before",
        gates: Gates = "soft",
    ) -> None:
        super().__init__(input_size, hidden_size, kernel_size, gates)
        if reset not in RESETS:
            raise ValueError(f"reset: expected 'before' or 'after', got {reset!r}")
        self.reset: Reset = reset
        self.weight_x: nn.Parameter = self._weight(3 * hidden_size, input_size)
        self.weight_h: nn.Parameter = self._weight(2 * hidden_size, hidden_size)
        self.weight_n: nn.Parameter = self._weight(hidden_size, hidden_size)
        self.bias: nn.Parameter = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_n: nn.Parameter | None = nn.Parameter(torch.empty(hidden_size)) if reset == "after" else None
        self.reset_parameters()

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """X (N, Cx, H, W), h (N, C, H, W) -> y = h' in the dtype of x, h' in the dtype of h."""
        if torch.onnx.is_in_onnx_export():
            y, h_next = self._onnx_node(x, h, reset=self.reset)
            return y, h_next
        h_next = conv_gru(x, h, self.weight_x, self.bias, self.weight_h, self.weight_n, self.bias_n, self.gates)
        return h_next.to(x.dtype), h_next

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        return msgspec.structs.replace(super().cell_spec(name), reset=self.reset)


class ConvLSTMCell(_Cell):
    """One ConvLSTM step in the canonical form of `conv_lstm`.

    Args:
        input_size: channels of x.
        hidden_size: channels of h and c.
        kernel_size: kernel size of the convolutions: an odd number, or (height, width).
        gates: "soft" or "hard", as in `ConvGRUCell`.
        peephole: None; "channel" for one weight per channel; (H, W) for one per position, which
            fixes the map size (Shi et al. 2015).

    Raises:
        ValueError: an even kernel size or an unknown variant.
    """

    op = CONV_LSTM
    states: ClassVar[tuple[str, ...]] = CONV_LSTM.states

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: KernelSize = 3,
        *,
        peephole: Literal["channel"] | tuple[int, int] | None = None,
        gates: Gates = "soft",
    ) -> None:
        super().__init__(input_size, hidden_size, kernel_size, gates)
        self.weight_x: nn.Parameter = self._weight(4 * hidden_size, input_size)
        self.weight_h: nn.Parameter = self._weight(4 * hidden_size, hidden_size)
        self.bias: nn.Parameter = nn.Parameter(torch.empty(4 * hidden_size))
        size = (1, 1) if peephole == "channel" else peephole
        self.peephole: nn.Parameter | None = None if size is None else nn.Parameter(torch.empty(3, hidden_size, *size))
        self.reset_parameters()

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X (N, Cx, H, W), h, c (N, C, H, W) -> y = h' in the dtype of x, h', c'."""
        if torch.onnx.is_in_onnx_export():
            y, h_next, c_next = self._onnx_node(x, h, c)
            return y, h_next, c_next
        h_next, c_next = conv_lstm(x, h, c, self.weight_x, self.bias, self.weight_h, self.peephole, self.gates)
        return h_next.to(x.dtype), h_next, c_next

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        return msgspec.structs.replace(super().cell_spec(name), peephole=self.peephole is not None)


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def activations(gates: Gates) -> tuple[Activation, Activation]:
    """Functions of the gates and of the candidate: sigmoid and tanh, or their clamped lines for "hard"."""
    return (torch.sigmoid, torch.tanh) if gates == "soft" else (_hard_sigmoid, _hard_tanh)


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (0.5 * x + 0.5).clamp(0, 1)


def _hard_tanh(x: Tensor) -> Tensor:
    return x.clamp(-1, 1)
