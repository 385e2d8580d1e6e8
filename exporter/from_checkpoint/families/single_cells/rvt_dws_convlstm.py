"""DWSConvLSTM2d of RVT (Gehrig and Scaramuzza, CVPR 2023; github.com/uzh-rpg/RVT, models/layers/rnn.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stepcell.exporter.from_checkpoint.families.family import (
    Family,
    NotThisFamily,
    Tensors,
    check_names,
    weight_and_bias,
)
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, lstm_tensors, prefixed
from stepcell.models.cell_model import CellModel
from stepcell.models.cells import ConvLSTMCell
from stepcell.models.unfused_cells import ModuleLSTMCell, same_conv

__all__ = ["FAMILY"]


def _recognise(tensors: Tensors) -> dict[str, object]:
    depthwise = "conv3x3_dws.weight" in tensors
    check_names(tensors, weight_and_bias(("conv1x1", "conv3x3_dws") if depthwise else ("conv1x1",)))
    shape = tuple(tensors["conv1x1.weight"].shape)
    dim = shape[0] // 4
    if shape != (4 * dim, 2 * dim, 1, 1):
        raise NotThisFamily(f"conv1x1.weight: expected (4 dim, 2 dim, 1, 1), got {shape}")
    if not depthwise:
        return {"dim": dim, "dws_conv": False}
    outputs, _, kernel, _ = tensors["conv3x3_dws.weight"].shape
    return {"dim": dim, "dws_conv": True, "dws_conv_only_hidden": outputs == dim, "dws_conv_kernel_size": kernel}


def _build(
    dim: int,
    dws_conv: bool = True,
    dws_conv_only_hidden: bool = True,
    dws_conv_kernel_size: int = 3,
) -> CellModel:
    if not dws_conv:
        return CellModel(ConvLSTMCell(dim, dim, 1), dim)
    pointwise = nn.Conv2d(2 * dim, 4 * dim, 1)
    kernel = dws_conv_kernel_size
    reason, kernels = "depthwise convolution before the 1x1 gate convolution", (kernel, kernel)
    if dws_conv_only_hidden:
        depthwise = same_conv(dim, dim, kernel, groups=dim)
        cell = ModuleLSTMCell(dim, reason, joint=pointwise, map_h=depthwise, kernel_size=kernels, order="fiog")
    else:
        both = nn.Sequential(same_conv(2 * dim, 2 * dim, kernel, groups=2 * dim), pointwise)
        cell = ModuleLSTMCell(dim, reason, joint=both, kernel_size=kernels, order="fiog")
    return CellModel(cell, dim)


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    if not arguments.get("dws_conv", True):
        f, i, o, g = blocks(gate(tensors, "conv1x1"), 4)
        return prefixed("cell", lstm_tensors(i, f, o, g))
    only_hidden = arguments.get("dws_conv_only_hidden", True)
    targets = {"conv1x1": "joint" if only_hidden else "joint.1", "conv3x3_dws": "map_h" if only_hidden else "joint.0"}
    renamed = {}
    for name, tensor in tensors.items():
        module, kind = name.split(".")
        renamed[f"cell.{targets[module]}.{kind}"] = tensor
    return renamed


FAMILY = Family(
    name="rvt_dws_convlstm",
    summary="DWSConvLSTM2d of uzh-rpg/RVT: 1x1 gates, optional depthwise convolution of h or of x and h",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "dim": "channels of x and of the states",
        "dws_conv": "whether there is a depthwise convolution",
        "dws_conv_only_hidden": "whether it reads h only, not x and h",
        "dws_conv_kernel_size": "its kernel, odd",
    },
    ignored=("cell_update_dropout",),
)
