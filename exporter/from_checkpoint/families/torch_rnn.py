"""torch.nn.GRU and torch.nn.LSTM: dense recurrent layers on feature vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors, check_names
from stepcell.models.stack import DenseStack, GRUCell, LSTMCell

__all__ = ["GRU", "LSTM"]


def _recognise(gates: int, kind: str) -> Callable[[Tensors], dict[str, object]]:
    def recognise(tensors: Tensors) -> dict[str, object]:
        if "weight_ih_l0" not in tensors or "weight_hh_l0" not in tensors:
            raise NotThisFamily("no tensor weight_ih_l0 with a weight_hh_l0")
        if any("reverse" in name or name.startswith("weight_hr") for name in tensors):
            raise NotThisFamily("bidirectional and projected layers cannot be run one step at a time", near=True)
        rows, hidden = tensors["weight_hh_l0"].shape
        if rows != gates * hidden:
            raise NotThisFamily(f"weight_hh_l0 has {rows} rows, a {kind} has {gates} x {hidden}")
        layers = sum(name.startswith("weight_ih_l") for name in tensors)
        biased = any(name.startswith("bias_") for name in tensors)
        kinds = ("weight", "bias") if biased else ("weight",)
        check_names(tensors, (f"{kind}_{end}_l{i}" for kind in kinds for end in ("ih", "hh") for i in range(layers)))
        inputs = tensors["weight_ih_l0"].shape[1]
        return {"input_size": inputs, "hidden_size": hidden, "num_layers": layers, "bias": biased}

    return recognise


def _convert(
    rnn: Callable[..., nn.RNNBase], from_torch: Callable[[Any, int], GRUCell | LSTMCell]
) -> Callable[[Tensors, Mapping[str, object]], dict[str, Tensor]]:
    def convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
        module = rnn(**arguments)
        module.load_state_dict(dict(tensors))
        return DenseStack([from_torch(module, layer) for layer in range(module.num_layers)]).state_dict()

    return convert


def _build(cell: type[GRUCell] | type[LSTMCell]) -> Callable[..., DenseStack]:
    def build(input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True) -> DenseStack:
        del bias  # a layer without biases is converted to zero biases
        return DenseStack([cell(input_size if i == 0 else hidden_size, hidden_size) for i in range(num_layers)])

    return build


_ARGUMENTS = {
    "input_size": "features of the input",
    "hidden_size": "features of the hidden state",
    "num_layers": "number of stacked layers",
    "bias": "whether the layers have biases",
}

GRU = Family(
    name="gru",
    summary="torch.nn.GRU",
    recognise=_recognise(3, "GRU"),
    cell=True,
    build=_build(GRUCell),
    convert=_convert(nn.GRU, GRUCell.from_torch),
    arguments=_ARGUMENTS,
)
LSTM = Family(
    name="lstm",
    summary="torch.nn.LSTM",
    recognise=_recognise(4, "LSTM"),
    cell=True,
    build=_build(LSTMCell),
    convert=_convert(nn.LSTM, LSTMCell.from_torch),
    arguments=_ARGUMENTS,
)
