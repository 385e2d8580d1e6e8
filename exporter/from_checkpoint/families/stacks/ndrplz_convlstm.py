"""ConvLSTM stacks of ndrplz/ConvLSTM_pytorch (arXiv 1506.04214, without peepholes)."""

from __future__ import annotations

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layout import ARGUMENTS, StackLayout, build_stack
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, lstm_tensors
from stepcell.models.cells import ConvLSTMCell

__all__ = ["FAMILY"]


def _cell(layer: Tensors) -> dict[str, Tensor]:
    i, f, o, g = blocks(gate(layer, "conv"), 4)
    return lstm_tensors(i, f, o, g)


_LAYOUT = StackLayout(layer="cell_list.{}", required=("conv.weight",), optional=("conv.bias",), gates=4, cell=_cell)

FAMILY = Family(
    name="ndrplz_convlstm",
    summary="ConvLSTM stack of ndrplz/ConvLSTM_pytorch",
    recognise=_LAYOUT.recognise,
    cell=True,
    build=build_stack(ConvLSTMCell),
    convert=_LAYOUT.convert,
    arguments=ARGUMENTS,
    ignored=("batch_first", "bias", "return_all_layers"),
)
