"""CGRU_cell and CLSTM_cell of jhhuang96/ConvLSTM-PyTorch (ConvRNN.py): GroupNorm inside the gates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors, check_names, weight_and_bias
from stepcell.models.cell_model import CellModel
from stepcell.models.unfused_cells import ModuleGRUCell, ModuleLSTMCell, WideGroupNorm, same_conv

__all__ = ["FAMILY"]

_CHANNELS_PER_GROUP = 32  # the number of groups is rounded down
_RENAMED = {"conv1": "conv_zr", "conv2": "conv_n", "conv": "joint"}


def _recognise(tensors: Tensors) -> dict[str, object]:
    lstm = "conv.0.weight" in tensors
    convs = ("conv",) if lstm else ("conv1", "conv2")
    check_names(tensors, weight_and_bias(f"{conv}.{part}" for conv in convs for part in (0, 1)))  # and its GroupNorm
    target, gates, weight = "CLSTM_cell" if lstm else "CGRU_cell", 4 if lstm else 2, tensors[f"{convs[0]}.0.weight"]
    features = weight.shape[0] // gates
    return {
        "target": target,
        "input_channels": weight.shape[1] - features,
        "filter_size": weight.shape[2],
        "num_features": features,
    }


def _build(
    target: str,
    input_channels: int,
    filter_size: int,
    num_features: int,
) -> CellModel:
    both, kernel = input_channels + num_features, (filter_size, filter_size)
    reason = "GroupNorm inside the gates"

    def normalised(outputs: int) -> nn.Sequential:
        groups = outputs // _CHANNELS_PER_GROUP
        if groups == 0 or outputs % groups:
            raise ValueError(f"num_features: expected a multiple of {_CHANNELS_PER_GROUP}, got {num_features}")
        return nn.Sequential(same_conv(both, outputs, filter_size), WideGroupNorm(groups, outputs))

    if target == "CGRU_cell":
        gates, candidate = normalised(2 * num_features), normalised(num_features)
        return CellModel(ModuleGRUCell(num_features, gates, candidate, reason, kernel_size=kernel), input_channels)
    if target == "CLSTM_cell":
        packed = normalised(4 * num_features)
        cell = ModuleLSTMCell(num_features, reason, joint=packed, kernel_size=kernel, order="ifgo")
        return CellModel(cell, input_channels)
    raise ValueError(f"target: expected CGRU_cell or CLSTM_cell, got {target!r}")


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    # The gates keep upstream's order: reordering channels would change the groups of GroupNorm.
    renamed = {}
    for name, tensor in tensors.items():
        module, rest = name.split(".", 1)
        renamed[f"cell.{_RENAMED[module]}.{rest}"] = tensor
    return renamed


FAMILY = Family(
    name="jhhuang96_convrnn",
    summary="CGRU_cell and CLSTM_cell of jhhuang96/ConvLSTM-PyTorch: GroupNorm inside the gates",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "target": "CGRU_cell or CLSTM_cell",
        "input_channels": "channels of x",
        "filter_size": "kernel, odd",
        "num_features": "channels of the states, a multiple of 32",
    },
    ignored=("shape",),
)
