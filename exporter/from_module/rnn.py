"""`torch.nn.GRU` and `torch.nn.LSTM` inside a module that is stepped one frame at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepcell.contract import CellSpec
from stepcell.exporter.from_module.calls import Call
from stepcell.exporter.from_module.identify import close
from stepcell.models.stack import GRUCell, LSTMCell

__all__ = ["AdoptedRNN", "adopt_rnn"]


class AdoptedRNN(nn.Module):
    """Canonical cells behind the call of the torch layer: forward(x, state), x with a time axis of length 1.

    States stay (layers, N, F); `wide_in` and `wide_out` are as in `AdoptedCell`.
    """

    def __init__(self, rnn: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        convert = GRUCell.from_torch if isinstance(rnn, nn.GRU) else LSTMCell.from_torch
        self.cells = nn.ModuleList([convert(rnn, layer) for layer in range(rnn.num_layers)])  # type: ignore[arg-type]
        self.names = ("h",) if isinstance(rnn, nn.GRU) else ("h", "c")
        self.time_axis = 1 if rnn.batch_first else 0
        self.batch_first, self.num_layers = rnn.batch_first, rnn.num_layers
        self.input_size, self.hidden_size = rnn.input_size, rnn.hidden_size
        self.wide_in: dict[str, Tensor] = {}
        self.wide_out: dict[str, Tensor] = {}
        self.tensors_in: dict[str, Tensor] = {}
        self.tensors_out: dict[str, Tensor] = {}

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        x = input.squeeze(self.time_axis)
        self.tensors_in = dict(zip(self.names, (hx,) if len(self.names) == 1 else hx, strict=True))
        states = [self.wide_in.get(name, self.tensors_in[name]) for name in self.names]
        new: list[tuple[Tensor, ...]] = []
        for layer, cell in enumerate(self.cells):
            maps = (tensor[:, :, None, None] for tensor in (x, *(state[layer] for state in states)))
            x, *updated = (tensor[:, :, 0, 0] for tensor in cell(*maps))
            new.append(tuple(updated))
        stacked = [torch.stack(each) for each in zip(*new, strict=True)]
        self.wide_out = dict(zip(self.names, stacked, strict=True))
        self.tensors_out = {name: state.to(x.dtype) for name, state in self.wide_out.items()}
        given_back = tuple(self.tensors_out.values())
        return x.unsqueeze(self.time_axis), given_back[0] if len(given_back) == 1 else given_back

    def first_layer(self, name: str) -> CellSpec:
        """For the log; the contract lists every layer by itself."""
        first = self.cells[0]
        assert isinstance(first, (GRUCell, LSTMCell))
        return first.cell_spec(name)


def adopt_rnn(rnn: nn.GRU | nn.LSTM, call: Call) -> AdoptedRNN | str:
    """The layer as canonical cells, or why it stays."""
    if rnn.bidirectional or rnn.proj_size:
        return "a bidirectional or projected layer cannot be stepped"
    count = 1 if isinstance(rnn, nn.GRU) else 2
    if len(call.tensors) != 1 + count or any(call.leaves[position].dim() != 3 for position in call.tensors):
        return "is not called with a batch of sequences and a state"
    if call.leaves[call.tensors[0]].shape[1 if rnn.batch_first else 0] != 1:
        return "runs over a sequence inside the step"
    adopted = AdoptedRNN(rnn)
    leaves = call.random(0, small=False)
    for step in range(4):
        leaves[call.tensors[0]] = call.random(step + 1, small=False)[call.tensors[0]]
        expected, got = (call.evaluate(module, leaves) for module in (rnn, adopted))
        if not all(close(mine, theirs) for mine, theirs in zip(got, expected, strict=True)):
            return "computes something else than its weights say"
        for position, value in zip(call.tensors[1:], expected[1:], strict=True):
            leaves[position] = value
    return adopted
