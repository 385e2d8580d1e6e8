"""What is found in a graph: recurrent cells, and what looks like one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

__all__ = ["Cell", "NearMiss", "Weights"]

Weights = tuple[NDArray[np.floating[Any]], ...]


@dataclass(frozen=True, eq=False)
class Cell:
    """One recurrent cell that an op computes exactly.

    Attributes:
        name: from the names of its nodes where they say something ("encoder.gru"), else "cell0".
        kernel: height and width of the op's kernel.
        states: (before, after) of h, then of c; values of the graph, which need not be its inputs.
        x: values [N, C_i, H, W] that make up the op's x, along the channels.
        weights: the op's weights in its own order and layout (docs/op-contract.md) and the dtype of x.
        note: the exact transformation of weights that was needed, or None.
    """

    name: str
    op: Literal["ConvGRU", "ConvLSTM"]
    hidden: int
    kernel: tuple[int, int]
    states: tuple[tuple[ir.Value, ir.Value], ...]
    x: tuple[ir.Value, ...]
    weights: Weights
    note: str | None = None


@dataclass(frozen=True)
class NearMiss:
    """What has the shape of a cell and was left alone, with the reason in a short sentence."""

    name: str
    kind: Literal["ConvGRU", "ConvLSTM"]
    hidden: int
    kernel: tuple[int, int]
    reason: str
