"""ConvGRU stacks of happyjin/ConvGRU-pytorch (arXiv 1511.06432)."""

from __future__ import annotations

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layout import ARGUMENTS, StackLayout, build_stack
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, gru_tensors
from stepcell.models.cells import ConvGRUCell

__all__ = ["FAMILY"]


def _cell(layer: Tensors) -> dict[str, Tensor]:
    r, z = blocks(gate(layer, "conv_gates"), 2)
    return gru_tensors(z, r, gate(layer, "conv_can"))


_LAYOUT = StackLayout(
    layer="cell_list.{}",
    required=("conv_gates.weight", "conv_can.weight"),
    optional=("conv_gates.bias", "conv_can.bias"),
    gates=2,
    cell=_cell,
)

FAMILY = Family(
    name="happyjin_convgru",
    summary="ConvGRU stack of happyjin/ConvGRU-pytorch",
    recognise=_LAYOUT.recognise,
    cell=True,
    build=build_stack(ConvGRUCell),
    convert=_LAYOUT.convert,
    arguments=ARGUMENTS,
    ignored=("batch_first", "bias", "return_all_layers", "input_size", "dtype"),
)
