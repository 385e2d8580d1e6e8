"""ConvGRU of github.com/openclimatefix/skillful_nowcasting (Ravuri et al. 2021, arXiv 2104.00954)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors, check_names
from stepcell.models.cell_model import CellModel
from stepcell.models.unfused_cells import ModuleGRUCell

__all__ = ["FAMILY"]

_GATES = ("update_gate_conv", "read_gate_conv", "output_conv")
_RAW = "parametrizations.weight"
_RAW_PARTS = ("original", "0._u", "0._v")


def _recognise(tensors: Tensors) -> dict[str, object]:
    raw = f"cell.output_conv.{_RAW}.original" in tensors
    parts = ["bias", *([f"{_RAW}.{part}" for part in _RAW_PARTS] if raw else ["weight"])]
    check_names(tensors, (f"cell.{name}.{part}" for name in _GATES for part in parts))
    weight = tensors[f"cell.output_conv.{_RAW}.original" if raw else "cell.output_conv.weight"]
    return {
        "input_channels": weight.shape[1],
        "output_channels": weight.shape[0],
        "kernel_size": weight.shape[2],
        "weights": "raw" if raw else "effective",
    }


def _build(input_channels: int, output_channels: int, kernel_size: int = 3) -> CellModel:
    if kernel_size != 3:
        raise ValueError(f"kernel_size: expected 3 (upstream pads by 1), got {kernel_size}")
    cell = ModuleGRUCell(
        output_channels,
        nn.Conv2d(input_channels, 2 * output_channels, 3, padding=1),
        nn.Conv2d(input_channels, output_channels, 3, padding=1),
        "ReLU candidate",
        candidate="relu",
    )
    return CellModel(cell, input_channels - output_channels)


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    (z, z_bias), (r, r_bias), (n, n_bias) = (_effective(tensors, f"cell.{name}") for name in _GATES)
    # Upstream computes h' = u . h + (1 - u) . n, so z = 1 - u.
    return {
        "cell.conv_zr.weight": torch.cat([-z, r]),
        "cell.conv_zr.bias": torch.cat([-z_bias, r_bias]),
        "cell.conv_n.weight": n,
        "cell.conv_n.bias": n_bias,
    }


def _effective(tensors: Tensors, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a gate; a spectrally normalised weight is divided by u^T W v with the stored u and v."""
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    weight, u, v = (tensors[f"{name}.{_RAW}.{part}"] for part in _RAW_PARTS)
    sigma = u.double() @ weight.double().flatten(1) @ v.double()
    return (weight.double() / sigma).to(weight.dtype), tensors[f"{name}.bias"]


FAMILY = Family(
    name="skillful_convgru",
    summary="ConvGRU of openclimatefix/skillful_nowcasting: ReLU candidate, spectrally normalised convolutions",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "input_channels": "channels of x and h together",
        "output_channels": "channels of h",
        "kernel_size": "3",
    },
    ignored=("sn_eps", "weights"),
)
