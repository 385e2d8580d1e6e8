"""ConvRNN, ConvLSTMCell and ConvGRUCell of OpenEB (github.com/prophesee-ai/openeb, core/temporal_modules.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.weights import (
    Gate,
    bias_of,
    blocks,
    fold_norm,
    gate,
    gru_tensors,
    prefixed,
    under,
)
from stepcell.models.cell_model import CellModel
from stepcell.models.cells import ConvGRUCell
from stepcell.models.published.openeb import ConvRNNOptions, cell_model, conv_rnn

__all__ = ["FAMILY", "cell_kind", "convs", "fold_batch_norm", "recognise_rnn", "rnn_tensors"]

_UNFUSED = {"conv_rz": "conv_zr", "conv_f": "conv_n"}


def recognise_rnn(tensors: Tensors) -> dict[str, object]:
    """Arguments of a ConvRNN that its tensors determine; tensors are named as in a ConvRNN saved alone."""
    separable = "conv_x2h.module.0.0.weight" in tensors
    first = "conv_x2h.module.0.0" if separable else "conv_x2h.module.0"
    lstm = any(name.startswith("timepool.conv_h2h.") for name in tensors)
    kind = "conv_h2h" if lstm else "conv_f"
    separable_hidden = f"timepool.{kind}.1.weight" in tensors
    hidden = tensors.get(f"timepool.{kind}.1.weight" if separable_hidden else f"timepool.{kind}.weight")
    weight = tensors.get(f"{first}.weight")
    if weight is None or hidden is None:
        raise NotThisFamily("no tensor conv_x2h.module.0.weight with a timepool.conv_h2h or timepool.conv_f")
    norm = under(tensors, "conv_x2h.module.1")
    if norm and not {"weight", "bias", "running_mean", "running_var"} <= set(norm):
        raise NotThisFamily("conv_x2h.module.1 lacks some tensors of a BatchNorm2d")
    inputs = weight.shape[1]
    if separable:  # a gru's input convolution keeps the channels; an lstm's does not determine the multiplier: 1
        inputs = weight.shape[0] if lstm else tensors["conv_x2h.module.0.1.weight"].shape[0]
    found: dict[str, object] = {
        "in_channels": inputs,
        "out_channels": hidden.shape[0] // (4 if lstm else 1),
        "kernel_size": _kernel(weight),
        "cell": "lstm" if lstm else "gru",
        "separable": separable,
        "separable_hidden": separable_hidden,
        "bias": f"{first}.bias" in tensors,
        "norm": "BatchNorm2d" if norm else "none",
    }
    if separable:
        found["depth_multiplier"] = weight.shape[0] // inputs
    return found


def rnn_tensors(tensors: Tensors, options: ConvRNNOptions) -> dict[str, Tensor]:
    """Tensors of `conv_rnn(options)` from those of a ConvRNN saved alone."""
    norm = "conv_x2h.module.1" if options.norm == "BatchNorm2d" else None
    if not options.fused:
        front = convs(tensors, "conv_x2h.module.0", "front.0", norm, biased=options.bias)
        cell = under(tensors, "timepool")
        return {**front, **prefixed("cell", _cell(cell, canonical=not options.separable_hidden))}
    weight, bias = fold_batch_norm(gate(tensors, "conv_x2h.module.0", biased=options.bias), tensors, norm)
    hidden, hidden_bias = gate(tensors, "timepool.conv_h2h", biased=True)
    assert hidden_bias is not None
    return prefixed("cell", {"weight_x": weight, "weight_h": hidden, "bias": bias + hidden_bias})


def fold_batch_norm(conv: Gate, tensors: Tensors, norm: str | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution followed by the BatchNorm `norm`, in eval mode."""
    if norm is None:
        return conv[0].clone(), bias_of(conv).clone()
    if f"{norm}.running_var" not in tensors:
        raise ValueError(f"norm: no tensor {norm}.running_var in the checkpoint")
    return fold_norm(conv, under(tensors, norm))


def convs(
    tensors: Tensors, source: str, target: str, norm: str | None = None, *, biased: bool = True
) -> dict[str, Tensor]:
    """A plain or separable convolution, with BatchNorm folded into its last part.

    Args:
        biased: whether upstream has biases; KeyError if one is missing.
    """
    found = {}
    for part in (".0", ".1") if f"{source}.0.weight" in tensors else ("",):
        conv = gate(tensors, source + part, biased=biased)
        weight, bias = fold_batch_norm(conv, tensors, None if part == ".0" else norm)
        found.update({f"{target}{part}.weight": weight, f"{target}{part}.bias": bias})
    return found


def _cell(tensors: Tensors, *, canonical: bool) -> dict[str, Tensor]:
    # Separable convolutions have a bias everywhere or nowhere, plain ones always.
    biased = any(name.endswith(".bias") for name in tensors) or not any(name.endswith(".1.weight") for name in tensors)
    if any(name.startswith("conv_h2h.") for name in tensors):
        return convs(tensors, "conv_h2h", "map_h", biased=biased)
    if not canonical:
        rz, n = (convs(tensors, name, target, biased=biased) for name, target in _UNFUSED.items())
        return {**rz, **n}
    # The first half of conv_rz is the update gate z, the second the reset gate r.
    z, r = blocks(gate(tensors, "conv_rz", biased=True), 2)
    return gru_tensors(z, r, gate(tensors, "conv_f", biased=True), x_first=False)


def _recognise(tensors: Tensors) -> dict[str, object]:
    tops = {name.split(".")[0] for name in tensors}
    parts = {name.rpartition(".")[0] for name in tensors}
    if tops == {"conv_x2h", "timepool"}:
        return {"target": "ConvRNN", "kwargs": recognise_rnn(tensors)}
    kwargs: dict[str, object]
    if parts in ({"conv_h2h"}, {"conv_h2h.0", "conv_h2h.1"}):
        separable = len(parts) == 2
        packed = tensors["conv_h2h.1.weight" if separable else "conv_h2h.weight"]
        first = tensors["conv_h2h.0.weight" if separable else "conv_h2h.weight"]
        target, kwargs = "ConvLSTMCell", {"hidden_dim": packed.shape[0] // 4, "kernel_size": _kernel(first)}
    elif parts in ({"conv_rz", "conv_f"}, {"conv_rz.0", "conv_rz.1", "conv_f.0", "conv_f.1"}):
        separable = len(parts) == 4
        packed = tensors["conv_f.1.weight" if separable else "conv_f.weight"]
        out, both = packed.shape[:2]
        target, kwargs = "ConvGRUCell", {"in_channels": both - out, "out_channels": out}
    else:
        raise NotThisFamily(
            "tensors other than conv_x2h with timepool, conv_h2h, or conv_rz with conv_f",
            near={"conv_x2h", "timepool"} <= tops,
        )
    if separable:
        kwargs["conv_func"] = "DepthWiseSeparableConv2d"
    return {"target": target, "kwargs": kwargs}


def _build(target: str, kwargs: Mapping[str, Any], **overrides: Any) -> CellModel:
    merged = {**kwargs, **overrides}
    return conv_rnn(_options(merged)) if target == "ConvRNN" else cell_model(target, merged)


def _convert(tensors: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    if arguments["target"] == "ConvRNN":
        overrides = {key: value for key, value in arguments.items() if key not in ("target", "kwargs")}
        return rnn_tensors(tensors, _options({**arguments["kwargs"], **overrides}))
    canonical = isinstance(_build(**arguments).cell, ConvGRUCell)
    return prefixed("cell", _cell(tensors, canonical=canonical))


def _options(kwargs: Mapping[str, Any]) -> ConvRNNOptions:
    known = {field.name for field in dataclasses.fields(ConvRNNOptions)}
    if unknown := sorted(set(kwargs) - known):
        raise ValueError(f"kwargs: ConvRNN takes no {', '.join(unknown)}")
    return ConvRNNOptions(**{**kwargs, "cell": cell_kind(kwargs.get("cell", "lstm"))})


def cell_kind(cell: Any) -> Any:
    """Upstream's argument `cell`, which may also be "GRU"; upstream itself fails with "LSTM"."""
    return "gru" if cell == "GRU" else cell


def _kernel(weight: Tensor) -> int | list[int]:
    height, width = weight.shape[2:]
    return height if height == width else [height, width]


_RNN = "of ConvRNN"
FAMILY = Family(
    name="openeb_convrnn",
    summary="ConvRNN, ConvLSTMCell, ConvGRUCell of prophesee-ai/openeb: soft or hard gates, strides, separable",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "target": "ConvRNN, ConvLSTMCell or ConvGRUCell",
        "kwargs": 'its arguments, such as {"in_channels": 5, "out_channels": 8}; the keys below override them',
        "stride": f"{_RNN}: of the input convolution",
        "padding": f"{_RNN}: of the input convolution",
        "dilation": f"{_RNN}: of the input convolution",
        "norm": f'{_RNN}: "BatchNorm2d", "InstanceNorm2d" or "none"',
        "hard": "hard gates (clamped lines)",
    },
)
