"""E2VID (Rebecq et al., TPAMI 2019, arXiv 1906.07165; github.com/uzh-rpg/rpg_e2vid and its branches)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.e2vid.state_dict import (
    Reader,
    block_type_of,
    count,
    has_frame_norm,
    norm_of,
)
from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.published.e2vid import EVENT_WINDOW, E2VIDRecurrent, SkipType
from stepcell.models.published.e2vid_blocks import BlockType

__all__ = ["FAMILY"]

_ROOT = "unetrecurrent"


def _recognise(tensors: Tensors) -> dict[str, object]:
    head, prediction = (tensors.get(f"{_ROOT}.{name}.conv2d.weight") for name in ("head", "pred"))
    if head is None or prediction is None or head.dim() != 4:
        raise NotThisFamily(f"no 4-D tensor {_ROOT}.head.conv2d.weight with a {_ROOT}.pred.conv2d.weight")
    channels = head.shape[0]
    if prediction.shape[1] not in (channels, 2 * channels):
        raise NotThisFamily(f"{_ROOT}.pred.conv2d.weight reads {prediction.shape[1]} channels, the head has {channels}")
    return {
        "num_bins": head.shape[1],
        "num_encoders": count(tensors, f"{_ROOT}.encoders"),
        "base_num_channels": channels,
        "num_residual_blocks": count(tensors, f"{_ROOT}.resblocks"),
        "recurrent_block_type": block_type_of(tensors, f"{_ROOT}.encoders.0.recurrent_block"),
        "skip_type": "sum" if prediction.shape[1] == channels else "concat",
        "norm": norm_of(tensors, f"{_ROOT}.encoders.0.conv"),
        "use_upsample_conv": f"{_ROOT}.decoders.0.conv2d.weight" in tensors,
    }


def _build(
    num_bins: int,
    base_num_channels: int = 32,
    num_encoders: int = 4,
    num_residual_blocks: int = 2,
    recurrent_block_type: BlockType = "convlstm",
    skip_type: SkipType = "sum",
    norm: str | None = None,
    use_upsample_conv: bool = True,
    event_window: str = EVENT_WINDOW,
) -> E2VIDRecurrent:
    return E2VIDRecurrent(
        num_bins,
        base_num_channels,
        num_encoders=num_encoders,
        num_residual_blocks=num_residual_blocks,
        recurrent_block_type=recurrent_block_type,
        skip_type=skip_type,
        use_upsample_conv=use_upsample_conv,
        frame_norm=has_frame_norm(norm),
        event_window=event_window,
    )


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    model = _build(**arguments)  # type: ignore[arg-type]  # `build` has checked the values of --set
    read = Reader(tensors, f"{_ROOT}.", arguments.get("norm"))
    kind = arguments.get("recurrent_block_type", "convlstm")
    found = {
        **prefixed("head", read.conv("head.conv2d")),
        **prefixed("prediction", read.layer("pred")),
    }
    for index in range(len(model.encoders)):
        encoder = f"encoders.{index}"
        found.update(prefixed(encoder, read.layer(f"{encoder}.conv")))
        found.update(prefixed(f"cells.{index}", read.cell(f"{encoder}.recurrent_block", kind)))
    for index in range(len(model.residuals)):
        found.update(prefixed(f"residuals.{index}", read.residual(f"resblocks.{index}")))
    for index, decoder in enumerate(model.decoders):
        name = f"decoders.{index}"
        layer = read.layer(name) if decoder.resize else read.layer(name, conv="transposed_conv2d", outputs_axis=1)
        found.update(prefixed(f"{name}.conv", layer))
    read.finish()
    return found


FAMILY = Family(
    name="e2vid_recurrent",
    summary="E2VIDRecurrent of rpg_e2vid (video from events: U-Net with a ConvLSTM or ConvGRU per encoder)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "num_bins": "channels of the event tensor",
        "num_encoders": "levels, each half the size of the one before",
        "base_num_channels": "channels of the head, doubled at every level",
        "num_residual_blocks": "residual blocks at the lowest level",
        "recurrent_block_type": '"convlstm" or "convgru"',
        "skip_type": '"sum" or "concat"; "no_skip" also concatenates',
        "norm": '"BN", "IN" or null',
        "use_upsample_conv": "bilinear resize and convolution, instead of a transposed convolution",
        "event_window": 'events of one step: "30ms", "15000events" or "0.35events/pixel"',
    },
    ignored=("kernel_size", "recurrent_blocks"),  # of the configuration shared with FireNet
)
