"""GRU-RCN of mangrick/pytorch-convgru-cell (arXiv 1511.06432): packed W, U, C or six convolutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.stacks.layout import Kernels, kernel_pairs
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.cells import ConvGRUCell
from stepcell.models.stack import CellStack

__all__ = ["FAMILY"]

_CPP, _PACKED, _SIX = "GRU_RCN", "Ref_GRU_RCN_Optimized_Impl", "Ref_GRU_RCN_Vanilla_Impl"
_CONVOLUTIONS = tuple(f"conv{name}.weight" for name in ("Wz", "Wr", "Wh", "Uz", "Ur", "Uh"))


def _recognise(tensors: Tensors) -> dict[str, object]:
    six = set(tensors) == set(_CONVOLUTIONS)
    if not six and set(tensors) != {"W", "U", "C"}:
        raise NotThisFamily("tensors other than W, U, C or convWz ... convUh")
    w, u, c = _packed(tensors)
    hidden = c.shape[0]
    if c.dim() != 4 or tuple(w.shape) != (3 * hidden, w.shape[1], *c.shape[2:]):
        raise NotThisFamily(f"W {tuple(w.shape)} does not hold the three blocks of C {tuple(c.shape)}")
    if tuple(u.shape) != (2 * hidden, hidden, *c.shape[2:]) or c.shape[1] != hidden:
        raise NotThisFamily(f"U {tuple(u.shape)} does not hold the two blocks of C {tuple(c.shape)}")
    # W, U and C do not distinguish the C++ extension from its Python form; the extension needs a 3x3 kernel.
    packed = _CPP if tuple(c.shape[2:]) == (3, 3) else _PACKED
    return {
        "impl": _SIX if six else packed,
        "in_channels": w.shape[1],
        "nb_kernels": hidden,
        "kernel_size": list(c.shape[2:]),
    }


def _build(
    in_channels: int,
    nb_kernels: int,
    kernel_size: Kernels,
    impl: str = _PACKED,
    batch_first: bool = True,
) -> CellStack:
    if impl not in (_CPP, _PACKED, _SIX):
        raise ValueError(f"impl: expected {_CPP}, {_PACKED} or {_SIX}, got {impl!r}")
    if not batch_first:
        raise ValueError("batch_first: expected true, got false")
    [(kh, kw)] = kernel_pairs("kernel_size", kernel_size, 1)
    if impl == _CPP and (kh, kw) != (3, 3):
        raise ValueError(f"kernel_size: {_CPP} pads 1 per side and keeps the size with [3, 3] only, got {kernel_size}")
    return CellStack([ConvGRUCell(in_channels, nb_kernels, (kh | 1, kw | 1))])


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    del arguments
    w, u, c = map(_odd, _packed(tensors))
    cell = {"weight_x": w, "weight_h": u, "weight_n": c, "bias": w.new_zeros(w.shape[0])}
    return prefixed("cells.0", cell)


def _packed(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    if "W" in tensors:
        return tensors["W"], tensors["U"], tensors["C"]
    wz, wr, wh, uz, ur, uh = (tensors[name] for name in _CONVOLUTIONS)
    return torch.cat([wz, wr, wh]), torch.cat([uz, ur]), uh


def _odd(weight: Tensor) -> Tensor:
    # padding="same" adds the odd pixel of an even kernel at the end; a zero row in front makes it symmetric
    kh, kw = weight.shape[2:]
    return F.pad(weight, (1 - kw % 2, 0, 1 - kh % 2, 0))


FAMILY = Family(
    name="mangrick_gru_rcn",
    summary="GRU-RCN of mangrick/pytorch-convgru-cell (packed W, U, C or six convolutions)",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    arguments={
        "impl": f"{_CPP} (the extension), {_PACKED} or {_SIX}",
        "in_channels": "channels of the input",
        "nb_kernels": "channels of the state",
        "kernel_size": "[height, width], or one number",
        "batch_first": "true; upstream's sequences have no other axis order",
    },
)
