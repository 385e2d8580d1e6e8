"""ConvGRU stacks of happyjin/ConvGRU-pytorch (arXiv 1511.06432)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, gru_tensors, prefixed
from stepcell.models.stack import CellStack, conv_gru_stack

__all__ = ["FAMILY"]

_GATES = "cell_list.{}.conv_gates.weight"
_NAMES = [f"cell_list.{{}}.{conv}.{part}" for conv in ("conv_gates", "conv_can") for part in ("weight", "bias")]


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = packed_layers(tensors, _GATES, 2)
    layers = layer_count(tensors, _GATES)
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
    input_size: Sequence[int] | None = None,
    dtype: str | None = None,
) -> CellStack:
    # A step has no time axis and keeps every layer's state; a convolution without bias gets zeros;
    # upstream needs input_size and dtype to make its zero state only.
    del batch_first, bias, return_all_layers, input_size, dtype
    kernels = kernel_pairs("kernel_size", kernel_size, num_layers)
    cells = conv_gru_stack(input_dim, per_layer("hidden_dim", hidden_dim, num_layers), kernels).cells
    return CellStack(list(cells), numbered=True)  # type: ignore[arg-type]


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    del arguments
    converted: dict[str, Tensor] = {}
    for layer in range(layer_count(tensors, _GATES)):
        r, z = blocks(gate(tensors, f"cell_list.{layer}.conv_gates"), 2)
        n = gate(tensors, f"cell_list.{layer}.conv_can")
        converted |= prefixed(f"cells.{layer}", gru_tensors(z, r, n))
    return converted


FAMILY = Family(
    name="happyjin_convgru",
    summary="ConvGRU stack of happyjin/ConvGRU-pytorch",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        **PACKED,
        "return_all_layers": "what upstream returns; a step keeps every layer's state",
        "input_size": "[height, width] of upstream's zero state; sizes stay free here",
        "dtype": "tensor type of upstream's zero state; no effect here",
    },
)
