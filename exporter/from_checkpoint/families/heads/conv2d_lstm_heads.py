"""Conv2D-LSTM heads: 3x3 convolution, ReLU, pooling and/or a linear layer, torch.nn.LSTM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import (
    Family,
    NotThisFamily,
    Tensors,
    check_names,
    weight_and_bias,
)
from stepcell.exporter.from_checkpoint.families.torch_rnn import LSTM
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.published.heads import ConvLSTMHead

__all__ = ["FAMILY"]

_GAP, _FCL, _HYBRID = "ConvLSTM_GAP", "ConvLSTM_FCL", "ConvLSTM_Hybrid"
_LSTM = "lstm."
_FC_UNITS = {_FCL: 128, _HYBRID: 64}
_SPATIAL = (64, 64)  # map size of the published linear layer


def _recognise(tensors: Tensors) -> dict[str, object]:
    conv = tensors.get("conv1.weight")
    if conv is None or conv.dim() != 4 or tuple(conv.shape[2:]) != (3, 3):
        raise NotThisFamily("no tensor conv1.weight with a 3x3 kernel")
    lstm = LSTM.recognise(_part(tensors))
    filters, fc = conv.shape[0], tensors.get("fc.weight")
    own = [name for name in tensors if name.startswith(_LSTM)]
    check_names(tensors, {*own, *weight_and_bias(("conv1",) if fc is None else ("conv1", "fc"))})
    found: dict[str, object] = {
        "cls": _GAP if fc is None else _HYBRID if fc.shape[1] == filters else _FCL,
        "input_channels": conv.shape[1],
        "conv_filters": filters,
        "lstm_hidden_size": lstm["hidden_size"],
        "lstm_layers": lstm["num_layers"],
    }
    if fc is not None:
        found["fc_units"] = fc.shape[0]
    if (filters if fc is None else fc.shape[0]) != lstm["input_size"]:
        raise NotThisFamily(f"the LSTM reads {lstm['input_size']} features, the layer before it has another number")
    return found


def _build(
    cls: str,
    input_channels: int,
    conv_filters: int,
    lstm_hidden_size: int,
    lstm_layers: int,
    fc_units: int | None = None,
    fc_spatial: Sequence[int] | None = None,
) -> ConvLSTMHead:
    if cls not in (_GAP, _FCL, _HYBRID):
        raise ValueError(f"cls: expected {_GAP}, {_FCL} or {_HYBRID}, got {cls!r}")
    height, width = _spatial(fc_spatial)
    return ConvLSTMHead(
        input_channels,
        conv_filters,
        lstm_hidden_size,
        lstm_layers,
        fc_units=None if cls == _GAP else fc_units or _FC_UNITS[cls],
        map_size=(height, width) if cls == _FCL else None,
    )


def _convert(tensors: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    if arguments["cls"] == _FCL:
        height, width = _spatial(arguments.get("fc_spatial"))
        pixels = tensors["fc.weight"].shape[1] // tensors["conv1.weight"].shape[0]
        if height * width != pixels:
            raise ValueError(f"fc_spatial: the linear layer reads {pixels} positions, got {[height, width]}")
    part = _part(tensors)
    lstm = LSTM.convert(part, LSTM.recognise(part))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LSTM)}
    return {**{name.replace("conv1.", "conv."): tensor for name, tensor in rest.items()}, **prefixed("cells", lstm)}


def _spatial(size: Sequence[int] | None) -> tuple[int, int]:
    height_width = tuple(size or _SPATIAL)
    if len(height_width) != 2:
        raise ValueError(f"fc_spatial: expected [height, width], got {size}")
    return height_width


def _from_shapes(shapes: Mapping[str, Sequence[int]], arguments: Mapping[str, Any]) -> dict[str, object]:
    x = shapes.get("x", ())
    return {"fc_spatial": list(x[2:])} if arguments.get("cls") == _FCL and len(x) == 4 else {}


def _part(tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(_LSTM): tensor for name, tensor in tensors.items() if name.startswith(_LSTM)}


FAMILY = Family(
    name="conv2d_lstm_heads",
    summary="Conv2D-LSTM heads (GAP, FC, hybrid): convolution, reduction to a vector, torch.nn.LSTM",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    from_shapes=_from_shapes,
    arguments={
        "cls": f"{_GAP}, {_FCL} or {_HYBRID}",
        "input_channels": "channels of the input",
        "conv_filters": "channels of the feature map",
        "lstm_hidden_size": "features of the state",
        "lstm_layers": "number of stacked LSTM layers",
        "fc_units": f"outputs of the linear layer, by default {_FC_UNITS[_FCL]} (FCL), {_FC_UNITS[_HYBRID]} (hybrid)",
        "fc_spatial": f"{_FCL}: [height, width] read by fc; by default that of --shape, or {list(_SPATIAL)}",
    },
)
