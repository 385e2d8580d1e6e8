"""ConvLSTM stacks of aserdega/convlstmgru (arXiv 1506.04214), peepholes per position on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
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
from stepcell.models.cells import ConvLSTMCell
from stepcell.models.variants import ActivatedConvLSTMCell, MapStack, check_activation

__all__ = ["FAMILY"]

_CONV = "cell_list.{}.conv.weight"
_PEEPHOLES = tuple(f"cell_list.{{}}.Wc{each}" for each in "ifo")
_NAMES = (_CONV, "cell_list.{}.conv.bias", *_PEEPHOLES)


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = packed_layers(tensors, _CONV, 4)
    layers = layer_count(tensors, _CONV)
    only_layers(tensors, _NAMES, layers)
    all_layers(tensors, _NAMES[:2], layers)
    count = sum(name.format(layer) in tensors for name in _PEEPHOLES for layer in range(layers))
    if count not in (0, 3 * layers):
        raise NotThisFamily("some layers have peepholes Wci, Wcf, Wco and some do not")
    found["peephole"] = count > 0
    if count:
        found["input_size"] = list(tensors[_PEEPHOLES[0].format(0)].shape[1:])
    return found


def _build(
    input_dim: int,
    hidden_dim: Sizes,
    kernel_size: Kernels,
    num_layers: int,
    batch_first: bool = False,
    bias: bool = True,
    activation: str | Sequence[str] = "tanh",
    peephole: bool = False,
    batchnorm: bool = False,
    input_size: Sequence[int] | None = None,
) -> MapStack:
    del batch_first  # a step has no time axis
    if batchnorm or not bias:
        rule = "batchnorm: expected false" if batchnorm else "bias: expected true"
        raise ValueError(f"{rule} (upstream's cell has no other form), got {batchnorm if batchnorm else bias}")
    if peephole and (input_size is None or len(input_size) != 2):
        raise ValueError(f"input_size: expected [height, width] with peephole, got {input_size}")
    size = (input_size[0], input_size[1]) if peephole and input_size else None
    hidden = per_layer("hidden_dim", hidden_dim, num_layers)
    kernels = kernel_pairs("kernel_size", kernel_size, num_layers)
    cells: list[ConvLSTMCell] = []
    for layer, name in enumerate(per_layer("activation", activation, num_layers)):
        sizes = (hidden[layer - 1] if layer else input_dim, hidden[layer], kernels[layer])
        if check_activation(name) == "tanh":
            cells.append(ConvLSTMCell(*sizes, peephole=size))
        else:
            cells.append(ActivatedConvLSTMCell(*sizes, peephole=size, activation=name))
    return MapStack(cells, size)


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    del arguments
    converted: dict[str, Tensor] = {}
    for layer in range(layer_count(tensors, _CONV)):
        i, f, o, g = blocks(gate(tensors, f"cell_list.{layer}.conv"), 4)
        cell = lstm_tensors(i, f, o, g)
        if _PEEPHOLES[0].format(layer) in tensors:
            cell["peephole"] = torch.stack([tensors[name.format(layer)] for name in _PEEPHOLES])
        converted |= prefixed(f"cells.{layer}", cell)
    return converted


FAMILY = Family(
    name="aserdega_convlstm",
    summary="ConvLSTM stack of aserdega/convlstmgru (optional peepholes)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        **PACKED,
        "activation": "of candidate and output, such as tanh or relu, one name or one per layer",
        "peephole": "whether there are peepholes; they fix the map size",
        "batchnorm": "false; upstream's cell has no such layer",
        "input_size": "[height, width] of the map; it matters with peepholes only",
    },
)
