"""ConvGRU of Robust Video Matting (Lin et al. 2021, arXiv 2108.11515)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import (
    Family,
    NotThisFamily,
    Tensors,
    check_names,
    weight_and_bias,
)
from stepcell.exporter.from_checkpoint.families.weights import blocks, gate, gru_tensors, prefixed
from stepcell.models.cells import ConvGRUCell, size_pair
from stepcell.models.stack import CellStack

__all__ = ["FAMILY", "cell_tensors"]


def cell_tensors(tensors: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the canonical cell; upstream packs r before z, and x comes before h."""
    r, z = blocks(gate(tensors, f"{prefix}ih.0"), 2)
    return gru_tensors(z, r, gate(tensors, f"{prefix}hh.0"))


def _recognise(tensors: Tensors) -> dict[str, object]:
    check_names(tensors, weight_and_bias(("ih.0", "hh.0")))
    weight, channels = tensors["hh.0.weight"], tensors["hh.0.weight"].shape[0]
    if weight.dim() != 4 or weight.shape[1] != 2 * channels or len(tensors["ih.0.weight"]) != 2 * channels:
        raise NotThisFamily("x and h do not have the same number of channels")
    height, width = weight.shape[2:]
    if height == width:
        return {"channels": channels, "kernel_size": height, "padding": height // 2}
    return {"channels": channels, "kernel_size": [height, width], "padding": [height // 2, width // 2]}


def _build(channels: int, kernel_size: int | Sequence[int] = 3, padding: int | Sequence[int] = 1) -> CellStack:
    kernel, pad = size_pair(kernel_size), size_pair(padding)
    if pad != (kernel[0] // 2, kernel[1] // 2):
        raise ValueError(f"padding: expected half the kernel size, which keeps the size of the state, got {padding}")
    return CellStack([ConvGRUCell(channels, channels, kernel)])


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    return prefixed("cells.0", cell_tensors(tensors))


FAMILY = Family(
    name="rvm_convgru",
    summary="ConvGRU of Robust Video Matting (PeterL1n/RobustVideoMatting, model/decoder.py)",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "channels": "channels of x and of the hidden state",
        "kernel_size": "odd size of every convolution, such as 3 or [3, 5]",
        "padding": "half the kernel size",
    },
)
