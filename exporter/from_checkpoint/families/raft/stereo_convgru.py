"""ConvGRU of RAFT-Stereo (Lipson et al. 2021, arXiv 2109.07547), with context maps added in its gates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.raft.convgru import cell_sizes
from stepcell.models.published.raft import ContextConvGRU

__all__ = ["FAMILY"]

_LEAST = 4  # channels of two x of any sizes


def _recognise(tensors: Tensors) -> dict[str, object]:
    hidden, inputs, [(height, width)] = cell_sizes(tensors)
    if height != width:
        raise NotThisFamily(f"expected a square kernel, got {height}x{width}")
    found: dict[str, object] = {"hidden_dim": hidden, "input_dim": inputs, "kernel_size": height}
    # The coarsest GRU of a network, and the only one of a network with one, read a single x of h's size. Two x need
    # four channels for sizes that differ from each other and from 1.
    return {**found, "inputs": [inputs]} if inputs == hidden or inputs < _LEAST else found


def _build(
    hidden_dim: int, input_dim: int, kernel_size: int = 3, inputs: Sequence[int] | None = None
) -> ContextConvGRU:
    return ContextConvGRU(input_dim, hidden_dim, kernel_size, inputs)


def _convert(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    hidden = len(tensors["convz.weight"])

    def x_first(name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return torch.cat([weight[:, hidden:], weight[:, :hidden]], dim=1)

    return {
        "cell.gates.weight": torch.cat([x_first("convz"), x_first("convr")]),
        "cell.gates.bias": torch.cat([tensors["convz.bias"], tensors["convr.bias"]]),
        "cell.candidate.weight": x_first("convq"),
        "cell.candidate.bias": tensors["convq.bias"],
    }


def _from_shapes(shapes: Mapping[str, Sequence[int]], arguments: Mapping[str, object]) -> dict[str, object]:
    named = [f"x{index}" for index in range(len(shapes))]
    inputs = [shapes[name][1] for name in itertools.takewhile(shapes.__contains__, named) if len(shapes[name]) == 4]
    return {"inputs": inputs} if sum(inputs) == arguments["input_dim"] else {}


FAMILY = Family(
    name="raft_stereo_convgru",
    summary="ConvGRU of RAFT-Stereo with context maps cz, cr, cq (princeton-vl/RAFT-Stereo, core/update.py)",
    recognise=_recognise,
    cell=True,
    build=_build,
    convert=_convert,
    from_shapes=_from_shapes,
    arguments={
        "hidden_dim": "channels of the hidden state and of each context map",
        "input_dim": "channels of all x together",
        "kernel_size": "odd size of every convolution",
        "inputs": "channels of each x, such as [8, 6]; by default those of --shape, else one x with as many "
        "channels as h has, or x0 and x1 of any sizes",
    },
)
