"""Stacks that take an argument once for all layers or once per layer.

Three upstreams share their constructor: input_dim, hidden_dim, kernel_size, num_layers and a
`cell_list` of cells with all gates of [x, h] in one convolution; `PACKED` and `packed_layers` are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepcell.exporter.from_checkpoint.families.family import NotThisFamily, Tensors

__all__ = [
    "PACKED",
    "Kernels",
    "Sizes",
    "all_layers",
    "kernel_pairs",
    "layer_count",
    "only_layers",
    "packed_layers",
    "per_layer",
]

Sizes = int | Sequence[int]
Kernels = int | Sequence[int] | Sequence[Sequence[int]]

PACKED = {
    "input_dim": "channels of the input",
    "hidden_dim": "channels of the state, one number or one per layer",
    "kernel_size": "odd kernel: [height, width], or a list of such pairs, one per layer",
    "num_layers": "cells on top of each other",
    "batch_first": "axis order of upstream's sequences; a step has no time axis",
    "bias": "whether the convolutions have biases",
}


def per_layer(name: str, value: Any, layers: int) -> list[Any]:
    """A list as it is, anything else repeated; ValueError where the list has another length."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{name}: expected one value or {layers}, one per layer, got {value}")
    return values


def kernel_pairs(name: str, value: Kernels, layers: int) -> list[tuple[int, int]]:
    """Kernels as (height, width), one per layer.

    Upstream tells a tuple (one kernel for every layer) from a list of tuples; JSON has lists only,
    so two plain numbers are one kernel and nested lists are one per layer.
    """
    if isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in value):
        pairs = per_layer(name, value, layers)
    else:
        pairs = [value] * layers
    return [_pair(name, pair) for pair in pairs]


def _pair(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(size, int) for size in value):
        return value[0], value[1]
    raise ValueError(f"{name}: expected a size or [height, width], got {value}")


def layer_count(tensors: Tensors, name: str) -> int:
    """How many of `name.format(0)`, `name.format(1)`, ... there are, without a gap."""
    count = 0
    while name.format(count) in tensors:
        count += 1
    if not count:
        raise NotThisFamily(f"no tensor {name.format(0)}")
    return count


def only_layers(tensors: Tensors, names: Sequence[str], layers: int) -> None:
    """Refuse checkpoints with tensors that are none of these names, with {} for the layer."""
    known = {name.format(layer) for name in names for layer in range(layers)}
    if foreign := sorted(set(tensors) - known):
        raise NotThisFamily(f"has a tensor {foreign[0]}")


def all_layers(tensors: Tensors, names: Sequence[str], layers: int) -> None:
    """Refuse checkpoints without one of these names in one of the layers."""
    if missing := {name.format(layer) for name in names for layer in range(layers)} - set(tensors):
        raise NotThisFamily(f"no tensor {min(missing)}")


def packed_layers(tensors: Tensors, name: str, gates: int) -> dict[str, object]:
    """The arguments of PACKED from `name.format(layer)`, weights [gates * hidden, input + hidden, kh, kw]."""
    layers = layer_count(tensors, name)
    weights = [tensors[name.format(layer)] for layer in range(layers)]
    below, hidden_dim = 0, []
    for layer, weight in enumerate(weights):
        if weight.dim() != 4 or weight.shape[0] % gates:
            raise NotThisFamily(f"{name.format(layer)} {tuple(weight.shape)} does not hold {gates} gates")
        hidden_dim.append(weight.shape[0] // gates)
        if weight.shape[1] <= hidden_dim[-1] or (below and weight.shape[1] != below + hidden_dim[-1]):
            raise NotThisFamily(f"{name.format(layer)} reads {weight.shape[1]} channels, which is not [x, h]")
        below = hidden_dim[-1]
    return {
        "input_dim": weights[0].shape[1] - hidden_dim[0],
        "hidden_dim": hidden_dim,
        "kernel_size": [list(weight.shape[2:]) for weight in weights],
        "num_layers": layers,
        "bias": name.format(0).removesuffix("weight") + "bias" in tensors,
    }
