"""Families of stepcell's own models: the denoiser of the zoo and stacks of canonical cells."""

from __future__ import annotations

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.models.stack import conv_gru_stack, conv_lstm_stack
from stepcell.models.zoo.denoiser import Denoiser

__all__ = ["CONV_GRU", "CONV_LSTM", "DENOISER"]


def _recognise_denoiser(tensors: Tensors) -> dict[str, object]:
    expected = {"down.weight", "encoder.weight", "cell.weight_x", "decoder.weight", "up.weight"}
    if not expected <= set(tensors):
        raise NotThisFamily(f"no tensor {sorted(expected - set(tensors))[0]}")
    return {"hidden": tensors["down.weight"].shape[0]}


def _layers(tensors: Tensors, gates: int, kind: str) -> dict[str, object]:
    count = len({name.split(".")[1] for name in tensors if name.startswith("cells.") and name.count(".") == 2})
    hidden_sizes, kernel_sizes, input_size = [], [], 0
    for index in range(count):
        weight, hidden = tensors.get(f"cells.{index}.weight_x"), tensors.get(f"cells.{index}.weight_h")
        if weight is None or hidden is None or weight.dim() != 4:
            raise NotThisFamily(f"no 4-D tensor cells.{index}.weight_x with a cells.{index}.weight_h")
        size = hidden.shape[1]
        if weight.shape[0] != gates * size:
            raise NotThisFamily(f"cells.{index}.weight_x has {weight.shape[0]} rows, a {kind} has {gates} x {size}")
        input_size = input_size or weight.shape[1]
        hidden_sizes.append(size)
        kernel_sizes.append(list(weight.shape[2:]))
    if not count:
        raise NotThisFamily("no tensor cells.0.weight_x")
    return {"input_size": input_size, "hidden_sizes": hidden_sizes, "kernel_sizes": kernel_sizes}


def _recognise_gru(tensors: Tensors) -> dict[str, object]:
    found = _layers(tensors, 3, "ConvGRU")
    return {**found, "reset": "after" if "cells.0.bias_n" in tensors else "before"}


def _recognise_lstm(tensors: Tensors) -> dict[str, object]:
    return _layers(tensors, 4, "ConvLSTM")


_STACK_ARGUMENTS = {
    "input_size": "channels of the input",
    "hidden_sizes": "channels of each cell, such as [32, 64]",
    "kernel_sizes": "kernel of each cell, such as [3, [1, 5]]",
    "gates": '"soft" (sigmoid, tanh) or "hard" (clamped lines)',
}

DENOISER = Family(
    name="denoiser",
    summary="recurrent video denoiser of the zoo (encoder, ConvGRU, decoder)",
    recognise=_recognise_denoiser,
    build=Denoiser,
    arguments={"hidden": "channels of the features and the hidden state"},
)
CONV_GRU = Family(
    name="convgru",
    summary="stack of stepcell.models.ConvGRUCell (conv_gru_stack)",
    recognise=_recognise_gru,
    cell=True,
    build=conv_gru_stack,
    arguments={**_STACK_ARGUMENTS, "reset": '"before" or "after" the hidden convolution'},
)
CONV_LSTM = Family(
    name="convlstm",
    summary="stack of stepcell.models.ConvLSTMCell (conv_lstm_stack)",
    recognise=_recognise_lstm,
    cell=True,
    build=conv_lstm_stack,
    arguments=_STACK_ARGUMENTS,
)
