"""FireNet (Scheerlinck et al., WACV 2020; github.com/cedric-scheerlinck/rpg_e2vid, branch cedric/firenet)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from stepcell.models.published.e2vid import EVENT_WINDOW, FireNet
from stepcell.models.published.e2vid_blocks import BlockType

__all__ = ["FAMILY"]


def _recognise(tensors: Tensors) -> dict[str, object]:
    head = tensors.get("net.head.conv.conv2d.weight")
    if head is None or head.dim() != 4 or "net.pred.conv2d.weight" not in tensors:
        raise NotThisFamily("no 4-D tensor net.head.conv.conv2d.weight with a net.pred.conv2d.weight")
    residuals = count(tensors, "net.resblocks")
    recurrent = [i for i in range(residuals) if count(tensors, f"net.resblocks.{i}.recurrent_block")]
    return {
        "num_bins": head.shape[1],
        "base_num_channels": head.shape[0],
        "kernel_size": head.shape[2],
        "recurrent_blocks": {"resblock": recurrent},
        "num_residual_blocks": residuals,
        "recurrent_block_type": block_type_of(tensors, "net.head.recurrent_block"),
        "norm": norm_of(tensors, "net.head.conv"),
    }


def _recurrent_after(recurrent_blocks: object, residuals: int) -> list[int]:
    listed = recurrent_blocks.get("resblock", ()) if isinstance(recurrent_blocks, Mapping) else None
    if not isinstance(listed, Sequence) or not all(isinstance(index, int) for index in listed):
        raise ValueError(f'recurrent_blocks: expected {{"resblock": [indices]}}, got {recurrent_blocks!r}')
    return [index for index in range(residuals) if index in listed or -1 in listed]


def _build(
    num_bins: int,
    base_num_channels: int = 32,
    kernel_size: int = 3,
    recurrent_blocks: object = None,
    num_residual_blocks: int = 2,
    recurrent_block_type: BlockType = "convgru",
    skip_type: str | None = "no_skip",
    norm: str | None = None,
    event_window: str = EVENT_WINDOW,
) -> FireNet:
    if skip_type == "concat":
        raise ValueError("skip_type: expected 'no_skip' or 'sum' (there are no skip connections), got 'concat'")
    return FireNet(
        num_bins,
        base_num_channels,
        kernel_size=kernel_size,
        num_residual_blocks=num_residual_blocks,
        recurrent_after=_recurrent_after(
            {"resblock": [0]} if recurrent_blocks is None else recurrent_blocks, num_residual_blocks
        ),
        recurrent_block_type=recurrent_block_type,
        frame_norm=has_frame_norm(norm),
        event_window=event_window,
    )


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    model = _build(**arguments)  # type: ignore[arg-type]  # `build` has checked the values of --set
    kind = arguments.get("recurrent_block_type", "convgru")
    read = Reader(tensors, "net.", arguments.get("norm"))
    found = {
        **prefixed("head", read.layer("head.conv")),
        **prefixed("cells.0", read.cell("head.recurrent_block", kind)),
        **prefixed("prediction", read.conv("pred.conv2d")),
    }
    cells = 1
    for index in range(len(model.residuals)):
        name = f"resblocks.{index}"
        recurrent = index in model.recurrent_after
        found.update(prefixed(f"residuals.{index}", read.residual(f"{name}.conv" if recurrent else name)))
        if recurrent:
            found.update(prefixed(f"cells.{cells}", read.cell(f"{name}.recurrent_block", kind)))
            cells += 1
    read.finish()
    return found


FAMILY = Family(
    name="e2vid_firenet",
    summary="FireNet of rpg_e2vid (video from events: head, residual blocks, ConvGRU or ConvLSTM)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "num_bins": "channels of the event tensor",
        "base_num_channels": "channels of the features and states",
        "kernel_size": "of the head's convolution, odd",
        "recurrent_blocks": 'residual blocks followed by a cell, such as {"resblock": [0]}; -1 means all',
        "num_residual_blocks": "number of residual blocks",
        "recurrent_block_type": '"convgru" or "convlstm"',
        "skip_type": '"no_skip" or "sum", without effect',
        "norm": '"BN", "IN" or null',
        "event_window": 'events of one step: "30ms", "15000events" or "0.35events/pixel"',
    },
    ignored=("num_encoders", "use_upsample_conv"),  # of the configuration shared with E2VID
)
