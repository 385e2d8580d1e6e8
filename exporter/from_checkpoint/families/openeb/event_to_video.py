"""EventToVideo of OpenEB (github.com/prophesee-ai/openeb, event_to_video/event_to_video.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.openeb.convrnn import cell_kind, convs, recognise_rnn, rnn_tensors
from stepcell.exporter.from_checkpoint.families.weights import prefixed, under
from stepcell.models.published.openeb import ConvRNNOptions
from stepcell.models.published.openeb_networks import EventToVideo

__all__ = ["FAMILY"]


def _recognise(tensors: Tensors) -> dict[str, object]:
    for name in ("head.0.0.weight", "unet.decoders.0.0.conv1.0.weight", "predictor.0.weight", "flow.0.weight"):
        if name not in tensors:
            raise NotThisFamily(f"no tensor {name}")
    parts = {"head.0", "unet.encoders", "unet.decoders", "predictor.0", "flow.0"}
    if unexpected := sorted(name for name in tensors if ".".join(name.split(".")[:2]) not in parts):
        raise NotThisFamily(f"unexpected tensor {unexpected[0]}", near=True)
    base, in_channels = tensors["head.0.0.weight"].shape[:2]
    return {
        "in_channels": in_channels,
        "out_channels": tensors["predictor.0.weight"].shape[0],
        "num_layers": len({name.split(".")[2] for name in tensors if name.startswith("unet.encoders.")}),
        "base": base,
        "cell": recognise_rnn(under(tensors, "unet.encoders.0"))["cell"],
    }


def _build(
    in_channels: int,
    out_channels: int,
    num_layers: int = 3,
    base: int = 4,
    cell: str = "lstm",
    *,
    archi: str = "all_rnn",
    event_window: str = "30ms",
) -> EventToVideo:
    if archi != "all_rnn":
        raise ValueError(f"archi: expected 'all_rnn', got {archi!r}")
    return EventToVideo(in_channels, out_channels, num_layers, base, cell_kind(cell), event_window)


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    found = convs(tensors, "head.0.0", "head", "head.0.1")
    for head in ("predictor", "flow"):
        found |= convs(tensors, f"{head}.0", head)
    for block in ("0", "1"):
        source = f"unet.decoders.0.{block}"
        for name in ("conv1", "conv2", "downsample"):
            if f"{source}.{name}.0.weight" in tensors:
                found |= convs(
                    tensors, f"{source}.{name}.0", f"middle.{block}.{name}", f"{source}.{name}.1", biased=False
                )
    for side, first in (("encoders", 0), ("decoders", 1)):  # upstream's decoder 0 is `middle`
        layers = sorted({int(name.split(".")[2]) for name in tensors if name.startswith(f"unet.{side}.")})
        for layer in layers[first:]:
            own = under(tensors, f"unet.{side}.{layer}")
            options = ConvRNNOptions(**{**recognise_rnn(own), "bias": True})  # type: ignore[arg-type]
            found |= prefixed(f"{side}.{layer - first}", rnn_tensors(own, options))
    return found


FAMILY = Family(
    name="openeb_event_to_video",
    summary="EventToVideo of prophesee-ai/openeb: U-Net of ConvRNN layers with gray and flow heads",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "in_channels": "channels of the event frame",
        "out_channels": "channels of the output gray",
        "num_layers": "levels of the U-Net",
        "base": "channels of the head, doubled at each level",
        "cell": '"lstm" or "gru"',
        "archi": '"all_rnn"',
        "event_window": 'events of one step: "30ms", "15000events" or "0.35events/pixel"',
    },
    ignored=("separable", "separable_hidden"),  # upstream does not use them either
)
