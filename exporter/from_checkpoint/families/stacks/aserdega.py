"""ConvGRU and ConvLSTM stacks of aserdega/convlstmgru.

ConvGRU: the reset gate multiplies the recurrent convolution (reset "after"). ConvLSTM (arXiv 1506.04214):
optional peepholes, one weight per position. Both take any activation function instead of tanh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layout import (
    ARGUMENTS,
    Kernels,
    Sizes,
    StackLayout,
    layer_sizes,
    per_layer,
)
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, lstm_tensors
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell
from stepcell.models.stack import CanonicalCell, CellStack
from stepcell.models.unfused_cells import ActivatedConvGRUCell, ActivatedConvLSTMCell, check_activation

__all__ = ["CONV_GRU", "CONV_LSTM"]

_PEEPHOLES = ("Wci", "Wcf", "Wco")


def _gru_cell(layer: Tensors) -> dict[str, Tensor]:
    hidden = layer["conv_h2.weight"].shape[0]
    # Upstream's z weighs the old state, so its block is negated: 1 - sigmoid(a) = sigmoid(-a).
    sign = torch.ones(2 * hidden)
    sign[:hidden] = -1
    weight = layer["conv_zr.weight"] * sign[:, None, None, None]
    inputs = weight.shape[1] - hidden
    return {
        "weight_x": torch.cat([weight[:, :inputs], layer["conv_h1.weight"]]),
        "weight_h": weight[:, inputs:].contiguous(),
        "weight_n": layer["conv_h2.weight"],
        "bias": torch.cat([layer["conv_zr.bias"] * sign, layer["conv_h1.bias"]]),
        "bias_n": layer["conv_h2.bias"],
    }


def _lstm_cell(layer: Tensors) -> dict[str, Tensor]:
    i, f, o, g = blocks(gate(layer, "conv"), 4)
    peephole = {"peephole": torch.stack([layer[name] for name in _PEEPHOLES])} if _PEEPHOLES[0] in layer else {}
    return {**lstm_tensors(i, f, o, g), **peephole}


_GRU = StackLayout(
    layer="cell_list.{}",
    required=tuple(f"{conv}.{part}" for conv in ("conv_zr", "conv_h1", "conv_h2") for part in ("weight", "bias")),
    gates=2,
    cell=_gru_cell,
)
_LSTM = StackLayout(
    layer="cell_list.{}", required=("conv.weight", "conv.bias"), optional=_PEEPHOLES, gates=4, cell=_lstm_cell
)


def _recognise_lstm(tensors: Tensors) -> dict[str, object]:
    found = _LSTM.recognise(tensors)
    peephole = _LSTM.layers(tensors)[0].get(_PEEPHOLES[0])
    size = {} if peephole is None else {"input_size": list(peephole.shape[1:])}
    return {**found, "peephole": peephole is not None, **size}


def _build_gru(
    input_dim: int,
    hidden_dim: Sizes,
    kernel_size: Kernels,
    num_layers: int,
    bias: bool = True,
    activation: str | Sequence[str] = "tanh",
    batchnorm: bool = False,
) -> CellStack:
    _check_options(bias, batchnorm)
    sizes = layer_sizes(input_dim, hidden_dim, kernel_size, num_layers)
    return _stack(sizes, activation, partial(ConvGRUCell, reset="after"), ActivatedConvGRUCell)


def _build_lstm(
    input_dim: int,
    hidden_dim: Sizes,
    kernel_size: Kernels,
    num_layers: int,
    bias: bool = True,
    activation: str | Sequence[str] = "tanh",
    peephole: bool = False,
    batchnorm: bool = False,
    input_size: Sequence[int] | None = None,
) -> CellStack:
    _check_options(bias, batchnorm)
    if peephole and (input_size is None or len(input_size) != 2):
        raise ValueError(f"input_size: expected [height, width] with peephole, got {input_size}")
    map_size = (input_size[0], input_size[1]) if peephole and input_size else None
    sizes = layer_sizes(input_dim, hidden_dim, kernel_size, num_layers)
    return _stack(
        sizes, activation, partial(ConvLSTMCell, peephole=map_size), partial(ActivatedConvLSTMCell, peephole=map_size)
    )


def _check_options(bias: bool, batchnorm: bool) -> None:
    if batchnorm:
        raise ValueError("batchnorm: expected false (upstream's cell has no such layer), got true")
    if not bias:
        raise ValueError("bias: expected true (upstream's cell always has one), got false")


def _stack(
    sizes: list[tuple[int, int, tuple[int, int]]],
    activation: str | Sequence[str],
    tanh_cell: Callable[..., CanonicalCell],
    other_cell: Callable[..., CanonicalCell],
) -> CellStack:
    """Stack with an activation per layer: a canonical cell for tanh, an unfused one for any other."""
    names = [check_activation(name) for name in per_layer("activation", activation, len(sizes))]
    return CellStack(
        [
            tanh_cell(*layer) if name == "tanh" else other_cell(*layer, activation=name)
            for layer, name in zip(sizes, names, strict=True)
        ],
        numbered=True,
    )


_OPTIONS = {"bias": "true; upstream's cell has no other form", "batchnorm": "false; upstream's cell has no such layer"}

CONV_GRU = Family(
    name="aserdega_convgru",
    summary="ConvGRU stack of aserdega/convlstmgru (reset after the recurrent convolution)",
    recognise=_GRU.recognise,
    cell=True,
    build=_build_gru,
    convert=_GRU.convert,
    arguments={
        **ARGUMENTS,
        "activation": "of the candidate, such as tanh or relu, one name or one per layer",
        **_OPTIONS,
    },
    ignored=("batch_first", "input_size"),
)
CONV_LSTM = Family(
    name="aserdega_convlstm",
    summary="ConvLSTM stack of aserdega/convlstmgru (optional peepholes)",
    recognise=_recognise_lstm,
    cell=True,
    build=_build_lstm,
    convert=_LSTM.convert,
    arguments={
        **ARGUMENTS,
        "activation": "of candidate and output, such as tanh or relu, one name or one per layer",
        "peephole": "whether the cells have peepholes, which fix the map size",
        "input_size": "[height, width] of the map; only used with peepholes",
        **_OPTIONS,
    },
    ignored=("batch_first",),
)
