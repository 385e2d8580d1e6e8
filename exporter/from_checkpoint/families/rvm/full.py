"""Robust Video Matting (Lin et al. 2021, arXiv 2108.11515), the whole MobileNetV3 network."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import (
    Family,
    NotThisFamily,
    Tensors,
    check_names,
    weight_and_bias,
)
from stepcell.exporter.from_checkpoint.families.rvm.decoder import decoder_names, decoder_tensors, folded
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.published.rvm_full import BLOCKS, MattingNetwork

__all__ = ["FAMILY"]

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_BACKBONE_EPS = 1e-3
_REFINERS = ("deep_guided_filter", "fast_guided_filter")
_SEGMENTATION = {"project_seg.conv.weight", "project_seg.conv.bias"}  # an output that matting does not use
_REFINER_CONVS = {"refiner.conv.0": "slopes.0", "refiner.conv.3": "slopes.2"}


def _backbone_convs() -> dict[str, tuple[str, str]]:
    """Upstream's convolution and BatchNorm for each of our convolutions."""
    ends = {"stem": "backbone.features.0", "last": "backbone.features.16", "aspp1": "aspp.aspp1"}
    found = {ours: (f"{theirs}.0", f"{theirs}.1") for ours, theirs in ends.items()}
    for index, (inputs, _, wide, _, squeeze, *_) in enumerate(BLOCKS):
        parts = ["expand"] * (wide != inputs) + ["depthwise"] + ["squeeze"] * (squeeze > 0) + ["project"]
        for position, part in enumerate(parts):
            block = f"backbone.features.{index + 1}.block.{position}"
            if part != "squeeze":
                found[f"blocks.{index}.{part}"] = (f"{block}.0", f"{block}.1")
    return found


def _squeezes() -> dict[str, str]:
    """Upstream's fully connected layer for each of ours."""
    found = {}
    for index, (inputs, _, wide, _, squeeze, *_) in enumerate(BLOCKS):
        if squeeze:
            block = f"backbone.features.{index + 1}.block.{1 + (wide != inputs)}"
            found.update({f"blocks.{index}.{layer}": f"{block}.{layer}" for layer in ("fc1", "fc2")})
    return found


@functools.cache
def _names(*, deep: bool) -> frozenset[str]:
    names = {f"decoder.{name}" for name in decoder_names()} | _SEGMENTATION | {"aspp.aspp2.1.weight"}
    plain = [*_squeezes().values(), "project_mat.conv"]
    normed = list(_backbone_convs().values())
    if deep:
        plain.append("refiner.conv.6")
        normed += [("refiner.conv.0", "refiner.conv.1"), ("refiner.conv.3", "refiner.conv.4")]
        names.add("refiner.box_filter.weight")
    names |= weight_and_bias(plain)
    for conv, norm in normed:
        names |= {f"{conv}.weight", *(f"{norm}.{part}" for part in _NORM)}
    return frozenset(names)


def _recognise(tensors: Tensors) -> dict[str, object]:
    if "backbone.layer1.0.conv1.weight" in tensors:
        raise NotThisFamily("a ResNet50 backbone; only MobileNetV3 is supported", near=True)
    deep = "refiner.conv.0.weight" in tensors
    check_names(tensors, _names(deep=deep))
    return {"variant": "mobilenetv3", "refiner": _REFINERS[0] if deep else _REFINERS[1]}


def _build(
    variant: str = "mobilenetv3",
    refiner: str = "deep_guided_filter",
    downsample_ratio: float = 1.0,
) -> MattingNetwork:
    if variant != "mobilenetv3":
        raise ValueError(f"variant: expected mobilenetv3, got {variant}")
    if refiner not in _REFINERS:
        raise ValueError(f"refiner: expected {' or '.join(_REFINERS)}, got {refiner}")
    return MattingNetwork(refiner, downsample_ratio)  # type: ignore[arg-type]


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    converted = prefixed("decoder", decoder_tensors(tensors, "decoder."))
    for ours, (conv, norm) in _backbone_convs().items():
        eps = 1e-5 if ours == "aspp1" else _BACKBONE_EPS
        converted.update(folded(tensors, conv, norm, f"backbone.{ours}", eps))
    plain = {f"backbone.{ours}": theirs for ours, theirs in _squeezes().items()} | {"project": "project_mat.conv"}
    converted["backbone.aspp2.weight"] = tensors["aspp.aspp2.1.weight"]
    if arguments.get("downsample_ratio", 1) != 1:  # the refiner is not used at full size
        weight = tensors["project_mat.conv.weight"]
        converted["refiner.box.weight"] = tensors.get("refiner.box_filter.weight", weight.new_full((4, 1, 3, 3), 1 / 9))
        if arguments.get("refiner", _REFINERS[0]) == _REFINERS[0]:
            for theirs, ours in _REFINER_CONVS.items():
                norm = f"refiner.conv.{int(theirs[-1]) + 1}"
                converted.update(folded(tensors, theirs, norm, f"refiner.{ours}"))
            plain["refiner.slopes.4"] = "refiner.conv.6"
    for ours, theirs in plain.items():
        converted.update({f"{ours}.{part}": tensors[f"{theirs}.{part}"] for part in ("weight", "bias")})
    return converted


FAMILY = Family(
    name="rvm_full",
    summary="Robust Video Matting with MobileNetV3 (PeterL1n/RobustVideoMatting, model/)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "variant": "mobilenetv3",
        "refiner": "deep_guided_filter or fast_guided_filter",
        "downsample_ratio": "scale at which the network works, such as 0.25; by default 1, without refiner",
    },
    ignored=("pretrained_backbone",),  # the checkpoint holds the weights
)
