"""ConvGRU stacks of aserdega/convlstmgru: the reset gate multiplies the recurrent convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
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
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.cells import ConvGRUCell
from stepcell.models.stack import CellStack
from stepcell.models.variants import ActivatedConvGRUCell, check_activation

__all__ = ["FAMILY"]

_GATES = "cell_list.{}.conv_zr.weight"
_CONVOLUTIONS = ("conv_zr", "conv_h1", "conv_h2")
_NAMES = [f"cell_list.{{}}.{conv}.{part}" for conv in _CONVOLUTIONS for part in ("weight", "bias")]


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = packed_layers(tensors, _GATES, 2)
    layers = layer_count(tensors, _GATES)
    only_layers(tensors, _NAMES, layers)
    all_layers(tensors, _NAMES, layers)
    return found


def _build(
    input_dim: int,
    hidden_dim: Sizes,
    kernel_size: Kernels,
    num_layers: int,
    batch_first: bool = True,
    bias: bool = True,
    activation: str | Sequence[str] = "tanh",
    batchnorm: bool = False,
    input_size: Sequence[int] | None = None,
) -> CellStack:
    del batch_first, input_size  # a step has no time axis; upstream sizes its zero state with input_size only
    if batchnorm or not bias:
        rule = "batchnorm: expected false" if batchnorm else "bias: expected true"
        raise ValueError(f"{rule} (upstream's cell has no other form), got {batchnorm if batchnorm else bias}")
    hidden = per_layer("hidden_dim", hidden_dim, num_layers)
    kernels = kernel_pairs("kernel_size", kernel_size, num_layers)
    cells: list[ConvGRUCell] = []
    for layer, name in enumerate(per_layer("activation", activation, num_layers)):
        sizes = (hidden[layer - 1] if layer else input_dim, hidden[layer], kernels[layer])
        if check_activation(name) == "tanh":
            cells.append(ConvGRUCell(*sizes, reset="after"))
        else:
            cells.append(ActivatedConvGRUCell(*sizes, activation=name))
    return CellStack(cells, numbered=True)


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    del arguments
    converted: dict[str, Tensor] = {}
    for layer in range(layer_count(tensors, _GATES)):
        gates, x_part, h_part = (f"cell_list.{layer}.{conv}" for conv in _CONVOLUTIONS)
        hidden = tensors[f"{h_part}.weight"].shape[0]
        # z keeps the old state upstream, so its block is negated: 1 - sigmoid(a) = sigmoid(-a)
        sign = torch.ones(2 * hidden)
        sign[:hidden] = -1
        weight = tensors[f"{gates}.weight"] * sign[:, None, None, None]
        below = weight.shape[1] - hidden
        cell = {
            "weight_x": torch.cat([weight[:, :below], tensors[f"{x_part}.weight"]]),
            "weight_h": weight[:, below:].contiguous(),
            "weight_n": tensors[f"{h_part}.weight"],
            "bias": torch.cat([tensors[f"{gates}.bias"] * sign, tensors[f"{x_part}.bias"]]),
            "bias_n": tensors[f"{h_part}.bias"],
        }
        converted |= prefixed(f"cells.{layer}", cell)
    return converted


FAMILY = Family(
    name="aserdega_convgru",
    summary="ConvGRU stack of aserdega/convlstmgru (reset after the recurrent convolution)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        **PACKED,
        "activation": "of the candidate, such as tanh or relu, one name or one per layer",
        "batchnorm": "false; upstream's cell has no such layer",
        "input_size": "[height, width] of upstream's zero state; sizes stay free here",
    },
)
