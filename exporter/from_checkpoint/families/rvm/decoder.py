"""Recurrent decoder of Robust Video Matting (Lin et al. 2021, arXiv 2108.11515)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors, check_names
from stepcell.exporter.from_checkpoint.families.rvm.convgru import cell_tensors
from stepcell.exporter.from_checkpoint.families.weights import fold_norm, gate, prefixed, under
from stepcell.models.published.rvm import RecurrentDecoder

__all__ = ["FAMILY", "decoder_channels", "decoder_names", "decoder_tensors", "folded"]

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_GRU = ("ih.0.weight", "ih.0.bias", "hh.0.weight", "hh.0.bias")
_RGB = 3


@functools.cache
def decoder_names() -> frozenset[str]:
    """Names of all tensors of upstream's decoder."""
    names = {f"decode{level}.gru.{name}" for level in (4, 3, 2, 1) for name in _GRU}
    for conv, norm in _convs():
        names |= {f"{conv}.weight", *(f"{norm}.{name}" for name in _NORM)}
    return frozenset(names)


def decoder_channels(tensors: Tensors, prefix: str = "") -> tuple[list[int], list[int]]:
    """Channels of the features f1 to f4 and of the decoder."""
    below = 2 * len(tensors[f"{prefix}decode4.gru.hh.0.weight"])
    features, channels = [below], []
    for level in (3, 2, 1):
        weight = tensors[f"{prefix}decode{level}.conv.0.weight"]
        features.insert(0, weight.shape[1] - below - _RGB)
        below = len(weight)
        channels.append(below)
    return features, [*channels, len(tensors[f"{prefix}decode0.conv.0.weight"])]


def decoder_tensors(tensors: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of `RecurrentDecoder`."""
    converted = prefixed("decode4.gru", cell_tensors(tensors, f"{prefix}decode4.gru."))
    for level in (3, 2, 1):
        cell = cell_tensors(tensors, f"{prefix}decode{level}.gru.")
        converted.update(prefixed(f"decode{level}.memory.gru", cell))
    targets = ("decode3.conv", "decode2.conv", "decode1.conv", "decode0.0", "decode0.1")
    for target, (conv, norm) in zip(targets, _convs(), strict=True):
        converted.update(folded(tensors, prefix + conv, prefix + norm, target))
    return converted


def folded(tensors: Tensors, conv: str, norm: str, target: str, eps: float = 1e-5) -> dict[str, Tensor]:
    """A convolution and the BatchNorm that follows it, in eval mode, as one convolution."""
    weight, bias = fold_norm(gate(tensors, conv), under(tensors, norm), eps=eps)
    return {f"{target}.weight": weight, f"{target}.bias": bias}


def _convs() -> list[tuple[str, str]]:
    ups = [(f"decode{level}.conv.0", f"decode{level}.conv.1") for level in (3, 2, 1)]
    return [*ups, ("decode0.conv.0", "decode0.conv.1"), ("decode0.conv.3", "decode0.conv.4")]


def _recognise(tensors: Tensors) -> dict[str, object]:
    check_names(tensors, decoder_names())
    features, channels = decoder_channels(tensors)
    return {"feature_channels": features, "decoder_channels": channels}


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    return decoder_tensors(tensors)


FAMILY = Family(
    name="rvm_decoder",
    summary="recurrent decoder of Robust Video Matting (PeterL1n/RobustVideoMatting, model/decoder.py)",
    recognise=_recognise,
    build=RecurrentDecoder,
    convert=_convert,
    arguments={
        "feature_channels": "channels of f1, f2, f3 and f4, such as [16, 24, 40, 128]",
        "decoder_channels": "channels of the decoder from 1/8 of the size up, such as [80, 40, 32, 16]",
    },
)
