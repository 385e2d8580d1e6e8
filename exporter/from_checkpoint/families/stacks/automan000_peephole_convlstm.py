"""Peephole ConvLSTM of automan000/Convolutional_LSTM_PyTorch (arXiv 1506.04214), one cell or a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layout import Sizes, StackLayout
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.cells import ConvLSTMCell
from stepcell.models.stack import CellStack

__all__ = ["FAMILY"]

_CELL, _NETWORK = "ConvLSTMCell", "ConvLSTM"
_GATES = "ifoc"  # in the canonical order; upstream calls the candidate c
_PEEPHOLES = ("Wci", "Wcf", "Wco")


def _cell(layer: Tensors) -> dict[str, Tensor]:
    cell = {
        "weight_x": torch.cat([layer[f"Wx{g}.weight"] for g in _GATES]),
        "weight_h": torch.cat([layer[f"Wh{g}.weight"] for g in _GATES]),
        "bias": torch.cat([layer[f"Wx{g}.bias"] for g in _GATES]),
    }
    return cell | ({"peephole": torch.cat([layer[name] for name in _PEEPHOLES])} if _PEEPHOLES[0] in layer else {})


_LAYOUT = StackLayout(
    layer="cell{}",
    required=(
        *(f"Wx{g}.{part}" for g in _GATES for part in ("weight", "bias")),
        *(f"Wh{g}.weight" for g in _GATES),
    ),
    optional=_PEEPHOLES,
    cell=_cell,
)


def _as_network(tensors: Tensors) -> Tensors:
    """A cell saved alone has its tensors without the prefix "cell0."."""
    return prefixed("cell0", tensors) if "Wxi.weight" in tensors else tensors


def _recognise(tensors: Tensors) -> dict[str, object]:
    layers = _LAYOUT.layers(_as_network(tensors))
    weights = [layer["Wxi.weight"] for layer in layers]
    if any(weight.dim() != 4 or weight.shape[2:] != weights[0].shape[2:] for weight in weights):
        raise NotThisFamily("its cells have kernels of several sizes")
    hidden, network = [weight.shape[0] for weight in weights], "Wxi.weight" not in tensors
    found: dict[str, object] = {
        "target": _NETWORK if network else _CELL,
        "input_channels": weights[0].shape[1],
        "hidden_channels": hidden if network else hidden[0],
        "kernel_size": weights[0].shape[2],
    }
    peephole = layers[0].get(_PEEPHOLES[0])
    return found if peephole is None else {**found, "shape": list(peephole.shape[2:])}


def _build(
    input_channels: int,
    hidden_channels: Sizes,
    kernel_size: int,
    target: str = _NETWORK,
    shape: Sequence[int] | None = None,
) -> CellStack:
    if target not in (_CELL, _NETWORK):
        raise ValueError(f"target: expected {_CELL} or {_NETWORK}, got {target!r}")
    if shape is not None and len(shape) != 2:
        raise ValueError(f"shape: expected [height, width], got {shape}")
    map_size = None if shape is None else (shape[0], shape[1])
    hidden = [hidden_channels] if isinstance(hidden_channels, int) else list(hidden_channels)
    cells = [
        ConvLSTMCell(below, channels, kernel_size, peephole=map_size)
        for below, channels in zip([input_channels, *hidden], hidden, strict=False)
    ]
    # Upstream returns the states of the last layer only, as h and c.
    lower = [f"{name}{layer}" for layer in range(len(hidden) - 1) for name in ("h", "c")]
    return CellStack(cells, names=[*lower, "h", "c"])


def _convert(tensors: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    shape, converted = arguments.get("shape"), _LAYOUT.convert(_as_network(tensors), arguments)
    if shape is not None:
        # A file saved on a GPU lacks the peepholes; a new upstream model starts with zeros.
        for name in [name for name in converted if name.endswith(".weight_h")]:
            hidden = converted[name].shape[1]
            converted.setdefault(name.replace("weight_h", "peephole"), torch.zeros(3, hidden, *shape))
    return converted


FAMILY = Family(
    name="automan000_peephole_convlstm",
    summary="peephole ConvLSTM of automan000/Convolutional_LSTM_PyTorch (one cell or a stack)",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "target": f"{_CELL} (one cell) or {_NETWORK} (a stack)",
        "input_channels": "channels of the input",
        "hidden_channels": "channels of the state, for a stack one per layer",
        "kernel_size": "odd, one number",
        "shape": "[height, width] of the peepholes, which fix the map size",
    },
    ignored=("step", "effective_step", "bias"),
)
