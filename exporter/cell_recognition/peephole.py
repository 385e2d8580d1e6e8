"""Peephole terms of an LSTM's gates: `w . c` as weights per channel or per channel and position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.affine import Affine
from stepcell.exporter.cell_recognition.cell import NotACell
from stepcell.exporter.cell_recognition.convolution import diagonal_of
from stepcell.exporter.cell_recognition.values import Array, floats, rank, uncast

__all__ = ["peephole_weights", "split_peephole"]


def split_peephole(gate: Affine, memory: ir.Value | None) -> tuple[Affine, Array | None]:
    """Split the terms over the cell state `memory` off a pre-activation.

    Returns:
        The rest, and w as [C, 1, 1] or broadcast to [C, H, W]; None where there is no such term.

    Raises:
        NotACell: the cell state enters through a convolution, or a weight differs by stream.
    """
    terms = [] if memory is None else [s for s in gate.kernels if _factor(s, memory) is not None]
    if memory is None or not terms:
        return gate, None
    total: Array = np.zeros((gate.channels, 1, 1))
    for source in terms:
        factors = diagonal_of(gate.kernels[source])
        if factors is None:
            raise NotACell("the cell state enters a gate through a convolution, which is no peephole")
        weight = _factor(source, memory)
        assert weight is not None
        weight = weight.reshape((1,) * max(0, rank(memory) - weight.ndim) + weight.shape)
        if weight.ndim != rank(memory) or weight.shape[0] != 1:
            raise NotACell("a peephole weight that differs from stream to stream")
        weight = weight[0][:, None, None] if weight.ndim == 2 else weight[0]
        total = total + factors[:, None, None] * weight
    return gate.without(*terms), total


def peephole_weights(terms: Sequence[Array | None], c: ir.Value) -> Array | None:
    """The op's weight [3, C, 1, 1] or [3, C, H, W] from the terms of i, f and o; None without any.

    Raises:
        NotACell: weights per row or per column over maps whose size is not fixed.
    """
    present = [term for term in terms if term is not None]
    if not present:
        return None
    channels, height, width = np.broadcast_shapes(*(term.shape for term in present))
    if (height == 1) != (width == 1):
        shape = c.shape
        fixed = [shape[axis] if shape is not None else None for axis in (2, 3)]
        if not all(isinstance(size, int) for size in fixed):
            raise NotACell("a peephole weight per row or column needs maps of a fixed size")
        height, width = int(fixed[0]), int(fixed[1])  # type: ignore[arg-type]
    zero: Array = np.zeros((1, 1, 1))
    return np.stack([np.broadcast_to(zero if t is None else t, (channels, height, width)) for t in terms])


def _factor(source: ir.Value, memory: ir.Value) -> Array | None:
    """The weight w where a source is `w . memory`; 1 for the memory itself; None for any other value."""
    value = uncast(source)
    if value is memory:
        return np.ones((1,) * rank(memory))
    node = value.producer()
    if node is None or node.op_type != "Mul" or node.domain:
        return None
    for one, other in (node.inputs, node.inputs[::-1]):
        if one is not None and other is not None and other.const_value is not None and uncast(one) is memory:
            return floats(other)
    return None
