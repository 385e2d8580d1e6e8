"""Recognised cells and near misses, and the weights of a cell in the layout of its op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

from stepcell.contract import CellSpec
from stepcell.exporter.cell_recognition.affine import CONTEXT, DILATED, Affine
from stepcell.exporter.cell_recognition.convolution import pad_kernel
from stepcell.exporter.cell_recognition.values import Array, rank, uncast
from stepcell.ops import OPS, Gates, OpName, Reset

__all__ = ["GateWeights", "NearMiss", "NotACell", "RecognisedCell", "Weights", "inputs_of"]

Weights = tuple[NDArray[np.floating[Any]], ...]


@dataclass(frozen=True, eq=False)
class RecognisedCell:
    """A recurrent cell that an op computes exactly.

    Attributes:
        name: its path ("encoder.gru"), numbered where two cells have one path; "cell0" without a path.
        path: path of its module, where the names of its nodes hold one; else "".
        kernel: height and width of the op's kernel.
        states: (before, after) of h, then of c; values of the graph, not necessarily its inputs.
        x: values that make up the op's x, along the channels: [N, C_i, H, W], or [N, C_i] of a dense cell.
        weights: the op's weights in its own order and layout (docs/op-contract.md), in the dtype of x.
        reset: placement of a GRU's reset gate.
        gates: "soft" (sigmoid, tanh) or "hard" (clipped lines).
        peephole: whether the last of the weights is that of the peepholes.
        note: the exact transformation of weights that was needed, or None.
    """

    name: str
    path: str
    op: OpName
    hidden: int
    kernel: tuple[int, int]
    states: tuple[tuple[ir.Value, ir.Value], ...]
    x: tuple[ir.Value, ...]
    weights: Weights
    reset: Reset | None = None
    gates: Gates = "soft"
    peephole: bool = False
    note: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether its values are features [N, C], which are maps of one pixel to the op."""
        return rank(self.states[0][0]) == 2

    @property
    def spec(self) -> CellSpec:
        """Its entry in the contract."""
        return CellSpec(
            name=self.name,
            op=OPS[self.op].qualified_name,
            hidden=self.hidden,
            kernel=self.kernel,
            reset=self.reset,
            gates=self.gates,
            peephole=self.peephole,
        )


@dataclass(frozen=True, eq=False)
class NearMiss:
    """A part of the graph that has the form of a cell but is not replaced, with the reason in a short sentence.

    Attributes:
        states: (before, after) of the states that its equations determine: h of a GRU, c of an LSTM.
        after: the new h.
    """

    name: str
    kind: OpName
    hidden: int
    kernel: tuple[int, int]
    reason: str
    states: tuple[tuple[ir.Value, ir.Value], ...]
    after: ir.Value

    @property
    def spec(self) -> CellSpec:
        """Its entry in the contract."""
        return CellSpec(name=self.name, op=None, hidden=self.hidden, kernel=self.kernel, reason=self.reason)


class NotACell(Exception):
    """The op would not compute the same; the message says why."""


class GateWeights:
    """Kernels of all gates, padded to one size.

    Args:
        gates: one sum per gate.
        states: the recurrent sources; every other source is an input.
        products: further sums whose kernels must fit into the size: of a candidate's recurrent part.
    """

    def __init__(self, gates: Sequence[Affine], states: Sequence[ir.Value], products: Sequence[Affine] = ()) -> None:
        self._gates = gates
        self._states = states
        self._all = (*gates, *products)
        sizes = [kernel.shape[2:] for gate in self._all for kernel in gate.kernels.values()]
        self.kernel = (max(size[0] for size in sizes), max(size[1] for size in sizes))
        self.x = tuple(dict.fromkeys(s for gate in gates for s in gate.kernels if uncast(s) not in states))

    def of_inputs(self) -> Array:
        """[gates * C, C_x, kh, kw] over all inputs."""
        return np.concatenate([np.concatenate([self._of(g, s) for s in self.x], axis=1) for g in self._gates])

    def of_state(self, state: ir.Value, gates: Sequence[Affine]) -> Array:
        """[gates * C, C, kh, kw] over one recurrent source."""
        return np.concatenate([self._of(gate, state) for gate in gates])

    def bias(self) -> Array:
        """[gates * C]."""
        return np.concatenate([gate.bias for gate in self._gates])

    def notes(self) -> list[str]:
        """The transformations of weights that were needed."""
        found = set().union(*(gate.notes for gate in self._all))
        if DILATED in found:
            found.remove(DILATED)
            found.add(f"dilated kernel as a {self.kernel[0]}x{self.kernel[1]} kernel")
        if any(source in gate.maps for gate in self._gates for source in self.x):
            found.add(CONTEXT)
        return sorted(found)

    def _of(self, gate: Affine, source: ir.Value) -> Array:
        """A gate's kernel over one source, zeros where it has none."""
        own = [self._over(gate, source) for gate in self._all]
        width = next((kernel.shape[1] for kernels in own for kernel in kernels), gate.channels)  # a state's
        total: Array = np.zeros((gate.channels, width, *self.kernel))
        for kernel in self._over(gate, source):
            total = total + pad_kernel(kernel, self.kernel)
        return total

    def _over(self, gate: Affine, source: ir.Value) -> list[Array]:
        """Kernels over a source; a state also counts in another precision."""
        is_state = source in self._states
        return [w for s, w in gate.kernels.items() if s is source or (is_state and uncast(s) is source)]


def inputs_of(weights: GateWeights, h: ir.Value) -> tuple[ir.Value, ...]:
    """The values that make up x, checked: one dtype, as large as the state.

    Raises:
        NotACell: they cannot be concatenated along the channels.
    """
    if not weights.x:
        raise NotACell("nothing but the state enters the gates")
    for source in weights.x:
        if source.dtype != weights.x[0].dtype:
            raise NotACell(f"its inputs have several dtypes ({weights.x[0].dtype}, {source.dtype})")
        if rank(source) != rank(h):
            raise NotACell(f"{source.name} has {rank(source)} axes, and the state has {rank(h)}")
        for axis in (0, 2, 3)[: rank(h) - 1]:
            size, wanted = (v.shape[axis] if v.shape is not None else None for v in (source, h))
            broadcast = size == 1 and (axis > 0 or source.const_value is not None)
            if isinstance(size, int) and size != wanted and (broadcast or isinstance(wanted, int)):
                raise NotACell(f"{source.name} has size {size} on axis {axis}, and the state has {wanted}")
    if weights.x[0].dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise NotACell(f"its inputs are {weights.x[0].dtype}; the op computes in FLOAT or FLOAT16")
    return weights.x
