"""Step models of stacked canonical cells; a dense GRU or LSTM is a stack with 1x1 kernels on a 1x1 map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec, state_names
from stepcell.dims import Dim
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, Gates, KernelSize, Reset

__all__ = ["CanonicalCell", "CellStack", "DenseStack", "GRUCell", "LSTMCell", "conv_gru_stack", "conv_lstm_stack"]

CanonicalCell = ConvGRUCell | ConvLSTMCell


class CellStack(nn.Module):
    """Stacked cells: each one reads the output of the one below; hidden sizes and kernels may differ.

    inputs: x (batch, Cx, height, width); states: `h`, or `h0`, `c0`, `h1`, ... in a deeper stack;
    output: y (batch, C, height, width), the hidden state of the last cell in x's dtype. Peepholes with a
    weight per position fix height and width.

    Args:
        cells: from the input to the output.
        numbered: number the states of a single cell too (`h0`), as stacked upstream models do.
        names: names of all states, from the first cell on, in place of these.

    Raises:
        ValueError: no cells, or cells that do not fit together.
    """

    map_shape: tuple[Dim, ...] = ("height", "width")

    def __init__(
        self, cells: Sequence[CanonicalCell], *, numbered: bool = False, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if not cells:
            raise ValueError("cells: expected at least one, got none")
        for below, above in itertools.pairwise(cells):
            if above.input_size != below.hidden_size:
                raise ValueError(f"cells: {above} expects {above.input_size} channels, got {below.hidden_size}")
        self.cells: nn.ModuleList = nn.ModuleList(cells)
        layout, shape = "NCHW" if self.map_shape else None, _peephole_size(cells) or self.map_shape
        self.inputs: list[TensorSpec] = [
            TensorSpec(name="x", shape=("batch", cells[0].input_size, *shape), layout=layout)
        ]
        self.outputs: list[TensorSpec] = [
            TensorSpec(name="y", shape=("batch", cells[-1].hidden_size, *shape), layout=layout)
        ]
        hidden = [cell.hidden_size for cell in cells for _ in cell.states]
        names = names or state_names([cell.states for cell in cells], numbered=numbered)
        self.states: list[StateSpec] = [
            StateSpec(name=name, shape=("batch", size, *shape)) for name, size in zip(names, hidden, strict=True)
        ]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        new_states: list[Tensor] = []
        for cell in self.cells:
            assert isinstance(cell, (ConvGRUCell, ConvLSTMCell))
            count = len(cell.states)
            own = states[len(new_states) : len(new_states) + count]
            x, *updated = cell(x, *own)
            new_states.extend(updated)
        return x, *new_states


class DenseStack(CellStack):
    """Stacked dense cells on feature vectors: x (batch, F), states (batch, C), y (batch, C)."""

    map_shape: tuple[Dim, ...] = ()

    def __init__(self, cells: Sequence[CanonicalCell], *, numbered: bool = False) -> None:
        super().__init__(cells, numbered=numbered)
        if any(cell.kernel_size != (1, 1) for cell in cells):
            raise ValueError("cells: a dense stack needs kernel size 1")

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        results = super().forward(*(tensor[:, :, None, None] for tensor in (x, *states)))
        return tuple(result[:, :, 0, 0] for result in results)


class GRUCell(ConvGRUCell):
    """Dense GRU cell for x (N, F, 1, 1), h (N, C, 1, 1), with torch.nn.GRU's reset placement."""

    def __init__(self, input_size: int, hidden_size: int, *, reset: Reset = "after", gates: Gates = "soft") -> None:
        super().__init__(input_size, hidden_size, 1, reset=reset, gates=gates)

    @classmethod
    def from_torch(cls, gru: nn.GRU | nn.GRUCell, layer: int = 0) -> GRUCell:
        """Convert one layer of a torch GRU.

        torch packs r, z, n and computes h' = (1 - z) n + z h. The rows are reordered and the update
        gate is negated: 1 - sigmoid(a) = sigmoid(-a), so the conversion is exact.
        """
        w_ih, w_hh, b_ih, b_hh = _torch_layer(gru, layer)
        cell = cls(w_ih.shape[1], w_hh.shape[1]).to(w_ih.dtype)
        (r, z, n), (r_h, z_h, n_h) = w_ih.chunk(3), w_hh.chunk(3)
        (b_r, b_z, b_n), (c_r, c_z, c_n) = b_ih.chunk(3), b_hh.chunk(3)
        with torch.no_grad():
            cell.weight_x.copy_(torch.cat([-z, r, n])[:, :, None, None])
            cell.weight_h.copy_(torch.cat([-z_h, r_h])[:, :, None, None])
            cell.weight_n.copy_(n_h[:, :, None, None])
            cell.bias.copy_(torch.cat([-(b_z + c_z), b_r + c_r, b_n]))
            assert cell.bias_n is not None
            cell.bias_n.copy_(c_n)
        return cell


class LSTMCell(ConvLSTMCell):
    """Dense LSTM cell for x (N, F, 1, 1), h, c (N, C, 1, 1)."""

    def __init__(self, input_size: int, hidden_size: int, *, gates: Gates = "soft") -> None:
        super().__init__(input_size, hidden_size, 1, gates=gates)

    @classmethod
    def from_torch(cls, lstm: nn.LSTM | nn.LSTMCell, layer: int = 0) -> LSTMCell:
        """Convert one layer of a torch LSTM, which packs its gates in the order i, f, g, o."""
        w_ih, w_hh, b_ih, b_hh = _torch_layer(lstm, layer)
        cell = cls(w_ih.shape[1], w_hh.shape[1]).to(w_ih.dtype)

        def reorder(rows: Tensor) -> Tensor:
            i, f, g, o = rows.chunk(4)
            return torch.cat([i, f, o, g])

        with torch.no_grad():
            cell.weight_x.copy_(reorder(w_ih)[:, :, None, None])
            cell.weight_h.copy_(reorder(w_hh)[:, :, None, None])
            cell.bias.copy_(reorder(b_ih + b_hh))
        return cell


def conv_gru_stack(
    input_size: int,
    hidden_sizes: Sequence[int],
    kernel_sizes: Sequence[KernelSize],
    *,
    reset: Reset = "before",
    gates: Gates = "soft",
) -> CellStack:
    """A stack of ConvGRU cells with these hidden sizes and kernels."""
    sizes = [input_size, *hidden_sizes]
    return CellStack(
        [
            ConvGRUCell(below, size, kernel, reset=reset, gates=gates)
            for below, size, kernel in zip(sizes, hidden_sizes, kernel_sizes, strict=False)
        ]
    )


def conv_lstm_stack(
    input_size: int, hidden_sizes: Sequence[int], kernel_sizes: Sequence[KernelSize], *, gates: Gates = "soft"
) -> CellStack:
    """A stack of ConvLSTM cells with these hidden sizes and kernels."""
    sizes = [input_size, *hidden_sizes]
    return CellStack(
        [
            ConvLSTMCell(below, size, kernel, gates=gates)
            for below, size, kernel in zip(sizes, hidden_sizes, kernel_sizes, strict=False)
        ]
    )


def _peephole_size(cells: Sequence[CanonicalCell]) -> tuple[int, ...]:
    """Height and width that peepholes with a weight per position fix; empty if there are none."""
    peepholes = [cell.peephole for cell in cells if isinstance(cell, ConvLSTMCell) and cell.peephole is not None]
    sizes = {tuple(peephole.shape[2:]) for peephole in peepholes} - {(1, 1)}
    if len(sizes) > 1:
        raise ValueError(f"cells: peepholes of one map size, got {' and '.join(map(str, sorted(sizes)))}")
    return sizes.pop() if sizes else ()


def _torch_layer(rnn: nn.Module, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    suffix = "" if isinstance(rnn, nn.RNNCellBase) else f"_l{layer}"
    w_ih, w_hh = getattr(rnn, f"weight_ih{suffix}"), getattr(rnn, f"weight_hh{suffix}")
    if getattr(rnn, "bidirectional", False) or getattr(rnn, "proj_size", 0):
        raise ValueError("a bidirectional or projected layer cannot be run one step at a time")
    zeros = torch.zeros(w_ih.shape[0], dtype=w_ih.dtype)
    biases = (getattr(rnn, f"bias_ih{suffix}"), getattr(rnn, f"bias_hh{suffix}")) if rnn.bias else (zeros, zeros)
    return w_ih, w_hh, *biases
