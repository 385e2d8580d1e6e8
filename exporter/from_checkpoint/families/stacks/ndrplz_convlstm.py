"""ConvLSTM stacks of ndrplz/ConvLSTM_pytorch (arXiv 1506.04214, without peepholes)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layers import (
    PACKED,
    Kernels,
    Sizes,
    all_layers,
    kernel_pairs,
    layer_count,
    only_layers,
    packed_layers,
    per_layer,
)
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, lstm_tensors, prefixed
from stepcell.models.stack import CellStack, conv_lstm_stack

__all__ = ["FAMILY"]

_CONV = "cell_list.{}.conv.weight"
_NAMES = (_CONV, "cell_list.{}.conv.bias")


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = packed_layers(tensors, _CONV, 4)
    layers = layer_count(tensors, _CONV)
    only_layers(tensors, _NAMES, layers)
    biased = any(name.endswith(".bias") for name in tensors)
    all_layers(tensors, [name for name in _NAMES if biased or name.endswith(".weight")], layers)
    return found


def _build(
    input_dim: int,
    hidden_dim: Sizes,
    kernel_size: Kernels,
    num_layers: int,
    batch_first: bool = False,
    bias: bool = True,
    return_all_layers: bool = False,
) -> CellStack:
    # A step has no time axis and keeps every layer's state; a convolution without bias gets zeros.
    del batch_first, bias, return_all_layers
    kernels = kernel_pairs("kernel_size", kernel_size, num_layers)
    cells = conv_lstm_stack(input_dim, per_layer("hidden_dim", hidden_dim, num_layers), kernels).cells
    return CellStack(list(cells), numbered=True)  # type: ignore[arg-type]


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    del arguments
    converted: dict[str, Tensor] = {}
    for layer in range(layer_count(tensors, _CONV)):
        i, f, o, g = blocks(gate(tensors, f"cell_list.{layer}.conv"), 4)
        converted |= prefixed(f"cells.{layer}", lstm_tensors(i, f, o, g))
    return converted


FAMILY = Family(
    name="ndrplz_convlstm",
    summary="ConvLSTM stack of ndrplz/ConvLSTM_pytorch",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={**PACKED, "return_all_layers": "what upstream returns; a step keeps every layer's state"},
)
