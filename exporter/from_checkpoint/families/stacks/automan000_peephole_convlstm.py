"""Peephole ConvLSTM of automan000/Convolutional_LSTM_PyTorch (arXiv 1506.04214), one cell or a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layers import Sizes, all_layers, layer_count, only_layers
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.cells import ConvLSTMCell
from stepcell.models.variants import MapStack

__all__ = ["FAMILY"]

_CELL, _NETWORK = "ConvLSTMCell", "ConvLSTM"
_GATES = "ifoc"  # in the canonical order; upstream's candidate is called c
_PEEPHOLES = ("Wci", "Wcf", "Wco")
_PARTS = [f"Wx{g}.weight" for g in _GATES] + [f"Wx{g}.bias" for g in _GATES] + [f"Wh{g}.weight" for g in _GATES]


def _recognise(tensors: Tensors) -> dict[str, object]:
    network = "Wxi.weight" not in tensors
    prefix = "cell{}." if network else ""
    layers = layer_count(tensors, f"{prefix}Wxi.weight") if network else 1
    only_layers(tensors, [prefix + part for part in (*_PARTS, *_PEEPHOLES)], layers)
    all_layers(tensors, [prefix + part for part in _PARTS], layers)
    if any(name.rpartition(".")[2] in _PEEPHOLES for name in tensors):
        all_layers(tensors, [prefix + part for part in _PEEPHOLES], layers)
    weights = [tensors[f"{prefix}Wxi.weight".format(layer)] for layer in range(layers)]
    hidden = [weight.shape[0] for weight in weights]
    if any(weight.dim() != 4 or weight.shape[2:] != weights[0].shape[2:] for weight in weights):
        raise NotThisFamily("its cells have kernels of several sizes")
    found: dict[str, object] = {
        "target": _NETWORK if network else _CELL,
        "input_channels": weights[0].shape[1],
        "hidden_channels": hidden if network else hidden[0],
        "kernel_size": weights[0].shape[2],
    }
    peephole = tensors.get(f"{prefix}Wci".format(0))
    if peephole is not None:
        found["shape"] = list(peephole.shape[2:])
    return found


def _build(
    input_channels: int,
    hidden_channels: Sizes,
    kernel_size: int,
    target: str = _NETWORK,
    step: int = 1,
    effective_step: Sequence[int] = (1,),
    bias: bool = True,
    shape: Sequence[int] | None = None,
) -> MapStack:
    # One call is one step, whose output upstream keeps or not; its x convolutions always have a bias.
    del step, effective_step, bias
    if target not in (_CELL, _NETWORK):
        raise ValueError(f"target: expected {_CELL} or {_NETWORK}, got {target!r}")
    if shape is not None and len(shape) != 2:
        raise ValueError(f"shape: expected [height, width], got {shape}")
    size = None if shape is None else (shape[0], shape[1])
    hidden = [hidden_channels] if isinstance(hidden_channels, int) else list(hidden_channels)
    cells = [
        ConvLSTMCell(below, channels, kernel_size, peephole=size)
        for below, channels in zip([input_channels, *hidden], hidden, strict=False)
    ]
    # Upstream returns the states of the last layer alone, as h and c.
    lower = [f"{name}{layer}" for layer in range(len(hidden) - 1) for name in ("h", "c")]
    return MapStack(cells, size, [*lower, "h", "c"])


def _convert(tensors: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    network = "Wxi.weight" not in tensors
    shape, converted = arguments.get("shape"), {}
    for layer in range(layer_count(tensors, "cell{}.Wxi.weight") if network else 1):
        prefix = f"cell{layer}." if network else ""
        cell = {
            "weight_x": torch.cat([tensors[f"{prefix}Wx{g}.weight"] for g in _GATES]),
            "weight_h": torch.cat([tensors[f"{prefix}Wh{g}.weight"] for g in _GATES]),
            "bias": torch.cat([tensors[f"{prefix}Wx{g}.bias"] for g in _GATES]),
        }
        if f"{prefix}Wci" in tensors:
            cell["peephole"] = torch.cat([tensors[f"{prefix}{name}"] for name in _PEEPHOLES])
        elif shape is not None:  # a file saved on a GPU lacks them; a fresh upstream model has zeros
            cell["peephole"] = torch.zeros(3, cell["weight_h"].shape[1], *shape)
        converted.update(prefixed(f"cells.{layer}", cell))
    return converted


FAMILY = Family(
    name="automan000_peephole_convlstm",
    summary="peephole ConvLSTM of automan000/Convolutional_LSTM_PyTorch (one cell or a stack)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "target": f"{_CELL} (one cell) or {_NETWORK} (a stack)",
        "input_channels": "channels of the input",
        "hidden_channels": "channels of the state, for a stack one per layer",
        "kernel_size": "odd, one number",
        "step": "steps of upstream's loop over one frame; here the caller steps",
        "effective_step": "steps whose output upstream keeps; here the caller keeps",
        "bias": "without effect upstream too: the x convolutions always have one",
        "shape": "[height, width] that the peepholes fix",
    },
)
