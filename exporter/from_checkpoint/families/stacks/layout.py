"""Checkpoint layout of stacked cells: the same tensors in every layer, under a numbered prefix.

Three upstream repositories (aserdega, happyjin, ndrplz) share a constructor (input_dim, hidden_dim,
kernel_size, num_layers) and keep all gates of [x, h] in one packed convolution: ARGUMENTS describes that
constructor, `StackLayout.recognise` infers its values, and `build_stack` builds its step model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import NotThisFamily, Tensors, check_names
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.stack import CanonicalCell, CellStack

__all__ = ["ARGUMENTS", "Kernels", "Sizes", "StackLayout", "build_stack", "kernel_pairs", "layer_sizes", "per_layer"]

Sizes = int | Sequence[int]
Kernels = int | Sequence[int] | Sequence[Sequence[int]]

ARGUMENTS = {
    "input_dim": "channels of the input",
    "hidden_dim": "channels of the state, one number or one per layer",
    "kernel_size": "odd kernel: [height, width], or a list of such pairs, one per layer",
    "num_layers": "number of stacked cells",
}


@dataclass(frozen=True)
class StackLayout:
    """Tensors of one layer and their conversion.

    Attributes:
        layer: prefix of a layer's tensors, such as "cell_list.{}" with {} for its index.
        required: tensors that every layer has. For `recognise`, the first one is the weight of the
            convolution that reads [x, h] and packs `gates` gates.
        optional: tensors that either every layer has or none.
        cell: converts one layer's tensors, without the prefix, to those of the canonical cell.
        gates: number of packed gates.
    """

    layer: str
    required: tuple[str, ...]
    cell: Callable[[Tensors], dict[str, Tensor]]
    optional: tuple[str, ...] = ()
    gates: int = 1

    def layers(self, tensors: Tensors) -> list[dict[str, Tensor]]:
        """Tensors of each layer, without the prefix.

        Raises:
            NotThisFamily: a tensor is missing, or belongs to no layer.
        """
        first, count = self.required[0], 0
        while f"{self.layer.format(count)}.{first}" in tensors:
            count += 1
        prefixes = [f"{self.layer.format(index)}." for index in range(max(count, 1))]
        optional = [prefix + name for prefix in prefixes for name in self.optional]
        needed = [prefix + name for prefix in prefixes for name in self.required]
        needed += optional if any(name in tensors for name in optional) else []
        check_names(tensors, needed)
        names = (*self.required, *self.optional)
        return [{name: tensors[prefix + name] for name in names if prefix + name in tensors} for prefix in prefixes]

    def recognise(self, tensors: Tensors) -> dict[str, object]:
        """Values of ARGUMENTS and `bias`, from the weights (gates * hidden, input + hidden, kh, kw) of each layer."""
        name, layers = self.required[0], self.layers(tensors)
        weights = [layer[name] for layer in layers]
        below, hidden_dim = 0, []
        for index, weight in enumerate(weights):
            full = f"{self.layer.format(index)}.{name}"
            if weight.dim() != 4 or weight.shape[0] % self.gates:
                raise NotThisFamily(f"{full} {tuple(weight.shape)} does not hold {self.gates} gates")
            hidden_dim.append(weight.shape[0] // self.gates)
            if weight.shape[1] <= hidden_dim[-1] or (below and weight.shape[1] != below + hidden_dim[-1]):
                raise NotThisFamily(f"{full} reads {weight.shape[1]} channels, which is not [x, h]")
            below = hidden_dim[-1]
        return {
            "input_dim": weights[0].shape[1] - hidden_dim[0],
            "hidden_dim": hidden_dim,
            "kernel_size": [list(weight.shape[2:]) for weight in weights],
            "num_layers": len(weights),
            "bias": name.removesuffix("weight") + "bias" in layers[0],
        }

    def convert(self, tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
        """State_dict of a `CellStack`."""
        converted: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers(tensors)):
            converted |= prefixed(f"cells.{index}", self.cell(layer))
        return converted


def build_stack(cell: Callable[[int, int, tuple[int, int]], CanonicalCell]) -> Callable[..., CellStack]:
    """Builder of a stack of `cell(input_size, hidden_size, kernel_size)` from the values of ARGUMENTS."""

    def build(input_dim: int, hidden_dim: Sizes, kernel_size: Kernels, num_layers: int) -> CellStack:
        sizes = layer_sizes(input_dim, hidden_dim, kernel_size, num_layers)
        return CellStack([cell(*layer) for layer in sizes], numbered=True)

    return build


def layer_sizes(
    input_dim: int, hidden_dim: Sizes, kernel_size: Kernels, num_layers: int
) -> list[tuple[int, int, tuple[int, int]]]:
    """Input channels, hidden channels and kernel of each layer."""
    hidden = per_layer("hidden_dim", hidden_dim, num_layers)
    kernels = kernel_pairs("kernel_size", kernel_size, num_layers)
    return list(zip([input_dim, *hidden], hidden, kernels, strict=False))


def per_layer(name: str, value: Any, layers: int) -> list[Any]:
    """A list as it is, any other value repeated; ValueError if the list has another length."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{name}: expected one value or {layers}, one per layer, got {value}")
    return values


def kernel_pairs(name: str, value: Kernels, layers: int) -> list[tuple[int, int]]:
    """Kernels as (height, width), one per layer.

    Upstream distinguishes a tuple (one kernel for every layer) from a list of tuples. JSON only has
    lists, so two plain numbers are one kernel and nested lists are one per layer.
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
