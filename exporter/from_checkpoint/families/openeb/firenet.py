"""FireNet of OpenEB (github.com/prophesee-ai/openeb, corner_detection/firenet.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.openeb.convrnn import convs, rnn_tensors
from stepcell.exporter.from_checkpoint.families.weights import prefixed, under
from stepcell.models.published.openeb import ConvRNNOptions
from stepcell.models.published.openeb_networks import FireNet

__all__ = ["FAMILY"]

_BLOCKS = ("conv0", "conv1")
_LAYERS = ("conv3", "conv4")


def _recognise(tensors: Tensors) -> dict[str, object]:
    expected = [f"{block}.module.fc2.weight" for block in _BLOCKS]
    expected += [f"{layer}.timepool.conv_h2h.weight" for layer in _LAYERS]
    for name in (*expected, "conv0.module.conv1.0.weight", "pred.module.0.weight"):
        if name not in tensors:
            raise NotThisFamily(f"no tensor {name}")
    parts = {*_BLOCKS, *_LAYERS, "pred"}
    if unexpected := sorted(name for name in tensors if name.split(".")[0] not in parts):
        raise NotThisFamily(f"unexpected tensor {unexpected[0]}", near=True)
    base, cin = tensors["conv0.module.conv1.0.weight"].shape[:2]
    return {"cin": cin, "cout": tensors["pred.module.0.weight"].shape[0], "base": base}


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    found = convs(tensors, "pred.module.0", "pred")
    for block in _BLOCKS:
        for name in ("conv1", "conv2"):
            found |= convs(
                tensors, f"{block}.module.{name}.0", f"{block}.{name}", f"{block}.module.{name}.1", biased=False
            )
        for name in ("fc1", "fc2"):
            found |= convs(tensors, f"{block}.module.{name}", f"{block}.{name}")
        if f"{block}.module.downsample.0.weight" in tensors:
            found[f"{block}.downsample.weight"] = tensors[f"{block}.module.downsample.0.weight"]
    for layer in _LAYERS:
        own = under(tensors, layer)
        hidden = own["timepool.conv_h2h.weight"].shape[1]
        found |= prefixed(layer, rnn_tensors(own, ConvRNNOptions(hidden, hidden)))
    return found


FAMILY = Family(
    name="openeb_firenet",
    summary="FireNet of prophesee-ai/openeb: two squeeze-and-excitation blocks, two ConvLSTM layers",
    recognise=_recognise,
    build=FireNet,
    convert=_convert,
    arguments={
        "cin": "channels of the event frame",
        "cout": "channels of the output",
        "base": "channels of the features, a multiple of 4",
        "event_window": 'events of one step: "30ms", "15000events" or "0.35events/pixel"',
    },
)
