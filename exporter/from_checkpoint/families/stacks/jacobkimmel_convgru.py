"""ConvGRU stacks of jacobkimmel/pytorch_convgru (arXiv 1511.06432)."""

from __future__ import annotations

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layout import Sizes, StackLayout, layer_sizes, per_layer
from stepcell.exporter.from_checkpoint.families.weights import gate, gru_tensors
from stepcell.models.cells import ConvGRUCell
from stepcell.models.stack import CellStack

__all__ = ["FAMILY"]

_GATES = ("update_gate", "reset_gate", "out_gate")


def _cell(layer: Tensors) -> dict[str, Tensor]:
    z, r, n = (gate(layer, name) for name in _GATES)
    return gru_tensors(z, r, n)


_LAYOUT = StackLayout(
    layer="ConvGRUCell_{:02d}",
    required=tuple(f"{name}.{part}" for name in _GATES for part in ("weight", "bias")),
    cell=_cell,
)


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = _LAYOUT.recognise(tensors)
    kernels = [layer["update_gate.weight"].shape[2:] for layer in _LAYOUT.layers(tensors)]
    if any(height != width for height, width in kernels):
        raise NotThisFamily("a kernel is not square")
    return {
        "input_size": found["input_dim"],
        "hidden_sizes": found["hidden_dim"],
        "kernel_sizes": [height for height, _ in kernels],
        "n_layers": found["num_layers"],
    }


def _build(input_size: int, hidden_sizes: Sizes, kernel_sizes: Sizes, n_layers: int) -> CellStack:
    kernels = [[size, size] for size in per_layer("kernel_sizes", kernel_sizes, n_layers)]
    return CellStack(
        [ConvGRUCell(*layer) for layer in layer_sizes(input_size, hidden_sizes, kernels, n_layers)], numbered=True
    )


FAMILY = Family(
    name="jacobkimmel_convgru",
    summary="ConvGRU stack of jacobkimmel/pytorch_convgru",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_LAYOUT.convert,
    arguments={
        "input_size": "channels of the input",
        "hidden_sizes": "channels of the state, one number or one per layer",
        "kernel_sizes": "odd kernel, one number or one per layer",
        "n_layers": "number of stacked cells",
    },
)
