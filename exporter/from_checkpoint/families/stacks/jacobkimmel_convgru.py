"""ConvGRU stacks of jacobkimmel/pytorch_convgru (arXiv 1511.06432), stepped frame by frame."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layers import (
    Sizes,
    all_layers,
    layer_count,
    only_layers,
    per_layer,
)
from stepcell.exporter.from_checkpoint.families.weights import gate, gru_tensors, prefixed
from stepcell.models.cells import ConvGRUCell
from stepcell.models.stack import CellStack

__all__ = ["FAMILY"]

_CELL = "ConvGRUCell_{:02d}"
_GATES = ("update_gate", "reset_gate", "out_gate")
_NAMES = [f"{_CELL}.{gate}.{part}" for gate in _GATES for part in ("weight", "bias")]


def _recognise(tensors: Tensors) -> dict[str, object]:
    layers = layer_count(tensors, f"{_CELL}.update_gate.weight")
    only_layers(tensors, _NAMES, layers)
    all_layers(tensors, _NAMES, layers)
    weights = [tensors[f"{_CELL.format(layer)}.update_gate.weight"] for layer in range(layers)]
    if any(weight.dim() != 4 or weight.shape[2] != weight.shape[3] for weight in weights):
        raise NotThisFamily("a kernel is not square")
    hidden_sizes = [weight.shape[0] for weight in weights]
    return {
        "input_size": weights[0].shape[1] - hidden_sizes[0],
        "hidden_sizes": hidden_sizes,
        "kernel_sizes": [weight.shape[2] for weight in weights],
        "n_layers": layers,
    }


def _build(input_size: int, hidden_sizes: Sizes, kernel_sizes: Sizes, n_layers: int) -> CellStack:
    hidden = per_layer("hidden_sizes", hidden_sizes, n_layers)
    kernels = per_layer("kernel_sizes", kernel_sizes, n_layers)
    below = [input_size, *hidden]
    cells = [ConvGRUCell(*sizes) for sizes in zip(below, hidden, kernels, strict=False)]
    return CellStack(cells, numbered=True)


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    del arguments
    converted: dict[str, Tensor] = {}
    for layer in range(layer_count(tensors, f"{_CELL}.update_gate.weight")):
        z, r, n = (gate(tensors, f"{_CELL.format(layer)}.{name}") for name in _GATES)
        converted |= prefixed(f"cells.{layer}", gru_tensors(z, r, n))
    return converted


FAMILY = Family(
    name="jacobkimmel_convgru",
    summary="ConvGRU stack of jacobkimmel/pytorch_convgru",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "input_size": "channels of the input",
        "hidden_sizes": "channels of the state, one number or one per layer",
        "kernel_sizes": "odd kernel, one number or one per layer",
        "n_layers": "cells on top of each other",
    },
)
