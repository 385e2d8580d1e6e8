"""ConvGRU and SepConvGRU of RAFT (Teed and Deng 2020, arXiv 2003.12039)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import (
    Family,
    NotThisFamily,
    Tensors,
    check_names,
    weight_and_bias,
)
from stepcell.exporter.from_checkpoint.families.weights import gate, gru_tensors, prefixed
from stepcell.models.cells import ConvGRUCell
from stepcell.models.published.raft import SepConvGRU
from stepcell.models.stack import CellStack

__all__ = ["CONV_GRU", "SEP_CONV_GRU", "cell_sizes", "cell_tensors", "separable_tensors"]


def cell_sizes(tensors: Tensors, suffixes: tuple[str, ...] = ("",)) -> tuple[int, int, list[tuple[int, int]]]:
    """Hidden and input channels, and the kernel of each cell `convz<suffix>`, `convr...`, `convq...`.

    Raises:
        NotThisFamily: there are other tensors, or their shapes disagree.
    """
    convs = [f"conv{letter}{suffix}" for suffix in suffixes for letter in "zrq"]
    check_names(tensors, weight_and_bias(convs))
    shapes = [tuple(tensors[f"{conv}.weight"].shape) for conv in convs]
    if any(len(shape) != 4 or shape[:2] != shapes[0][:2] for shape in shapes) or shapes[0][1] <= shapes[0][0]:
        raise NotThisFamily("expected convolutions that read [h, x] and return as many channels as h has")
    return shapes[0][0], shapes[0][1] - shapes[0][0], [(shape[2], shape[3]) for shape in shapes[::3]]


def cell_tensors(tensors: Tensors, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
    """Tensors of a `ConvGRUCell`; upstream's h comes before x."""
    z, r, q = (gate(tensors, f"{prefix}conv{letter}{suffix}") for letter in "zrq")
    return gru_tensors(z, r, q, x_first=False)


def separable_tensors(tensors: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a `SepConvGRUCell`."""
    return {
        **prefixed("horizontal", cell_tensors(tensors, prefix, "1")),
        **prefixed("vertical", cell_tensors(tensors, prefix, "2")),
    }


def _recognise(tensors: Tensors) -> dict[str, object]:
    hidden, inputs, kernels = cell_sizes(tensors)
    if kernels != [(3, 3)]:
        raise NotThisFamily(f"expected a 3x3 kernel, got {kernels[0][0]}x{kernels[0][1]}")
    return {"hidden_dim": hidden, "input_dim": inputs}


def _recognise_separable(tensors: Tensors) -> dict[str, object]:
    hidden, inputs, kernels = cell_sizes(tensors, ("1", "2"))
    if kernels != [(1, 5), (5, 1)]:
        raise NotThisFamily("expected a 1x5 and a 5x1 kernel")
    return {"hidden_dim": hidden, "input_dim": inputs}


def _build(hidden_dim: int = 128, input_dim: int = 192 + 128) -> CellStack:
    return CellStack([ConvGRUCell(input_dim, hidden_dim, 3)])


def _build_separable(hidden_dim: int = 128, input_dim: int = 192 + 128) -> SepConvGRU:
    return SepConvGRU(input_dim, hidden_dim)


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    return prefixed("cells.0", cell_tensors(tensors))


def _convert_separable(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    return prefixed("cell", separable_tensors(tensors))


_ARGUMENTS = {"hidden_dim": "channels of the hidden state", "input_dim": "channels of x"}

CONV_GRU = Family(
    name="raft_convgru",
    summary="ConvGRU of RAFT (princeton-vl/RAFT, core/update.py)",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments=_ARGUMENTS,
)
SEP_CONV_GRU = Family(
    name="raft_sepconvgru",
    summary="SepConvGRU of RAFT, 1x5 then 5x1 (princeton-vl/RAFT, core/update.py)",
    recognise=_recognise_separable,
    cell=True,
    build=_build_separable,
    convert=_convert_separable,
    arguments=_ARGUMENTS,
)
