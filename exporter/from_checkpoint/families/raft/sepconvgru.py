"""The SepConvGRU of RAFT (Teed and Deng 2020, arXiv 2003.12039): a horizontal, then a vertical cell."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.raft.convgru import cell_sizes, cell_tensors
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.published.raft import SepConvGRU

__all__ = ["FAMILY", "cells_tensors"]


def cells_tensors(tensors: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of both cells of `SepConvGRUCell`."""
    return {
        **prefixed("horizontal", cell_tensors(tensors, prefix, "1")),
        **prefixed("vertical", cell_tensors(tensors, prefix, "2")),
    }


def _recognise(tensors: Tensors) -> dict[str, object]:
    hidden, inputs, kernels = cell_sizes(tensors, ("1", "2"))
    if kernels != [(1, 5), (5, 1)]:
        raise NotThisFamily("the kernels are 1x5 and 5x1")
    return {"hidden_dim": hidden, "input_dim": inputs}


def _build(hidden_dim: int = 128, input_dim: int = 192 + 128) -> SepConvGRU:
    return SepConvGRU(input_dim, hidden_dim)


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    return prefixed("cell", cells_tensors(tensors))


FAMILY = Family(
    name="raft_sepconvgru",
    summary="SepConvGRU of RAFT, 1x5 then 5x1 (princeton-vl/RAFT, core/update.py)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={"hidden_dim": "channels of the hidden state", "input_dim": "channels of x"},
)
