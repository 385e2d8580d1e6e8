"""Weights of a cell in the op's layout, from the sums that its gates are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.affine import CONTEXT, DILATED, Affine
from stepcell.exporter.cell_recognition.constants import Array
from stepcell.exporter.cell_recognition.convolution import pad_kernel
from stepcell.exporter.cell_recognition.layout import uncast

__all__ = ["NotACell", "Packed", "inputs_of"]


class NotACell(Exception):
    """The op would not compute the same; the message says why."""


class Packed:
    """The kernels of all gates, brought to one size.

    Args:
        gates: one sum per gate.
        states: the recurrent sources; every other source is an input.
    """

    def __init__(self, gates: Sequence[Affine], states: Sequence[ir.Value]) -> None:
        self._gates = gates
        self._states = states
        sizes = [kernel.shape[2:] for gate in gates for kernel in gate.kernels.values()]
        self.kernel = (max(size[0] for size in sizes), max(size[1] for size in sizes))
        self.x = tuple(dict.fromkeys(s for gate in gates for s in gate.kernels if uncast(s) not in states))

    def input_weights(self) -> Array:
        """[gates * C, C_x, kh, kw] over all inputs."""
        return np.concatenate([np.concatenate([self._of(g, s) for s in self.x], axis=1) for g in self._gates])

    def state_weights(self, state: ir.Value, gates: Sequence[Affine]) -> Array:
        """[gates * C, C, kh, kw] over one recurrent source."""
        return np.concatenate([self._of(gate, state) for gate in gates])

    def bias(self) -> Array:
        return np.concatenate([gate.bias for gate in self._gates])

    def notes(self) -> list[str]:
        """What had to be done to the weights."""
        found = set().union(*(gate.notes for gate in self._gates))
        if DILATED in found:
            found.remove(DILATED)
            found.add(f"dilated kernel as a {self.kernel[0]}x{self.kernel[1]} kernel")
        if any(source in gate.maps for gate in self._gates for source in self.x):
            found.add(CONTEXT)
        return sorted(found)

    def _of(self, gate: Affine, source: ir.Value) -> Array:
        """A gate's kernel over one source, zeros where it has none."""
        own = [self._named(gate, source) for gate in self._gates]
        width = next((kernel.shape[1] for kernels in own for kernel in kernels), gate.channels)  # a state's
        total: Array = np.zeros((gate.channels, width, *self.kernel))
        for kernel in self._named(gate, source):
            total = total + pad_kernel(kernel, self.kernel)
        return total

    def _named(self, gate: Affine, source: ir.Value) -> list[Array]:
        """Kernels over a source; a state is also itself in another dtype."""
        is_state = source in self._states
        return [w for s, w in gate.kernels.items() if s is source or (is_state and uncast(s) is source)]


def inputs_of(packed: Packed, h: ir.Value) -> tuple[ir.Value, ...]:
    """The values that make up x, checked: maps of one dtype, as large as the state.

    Raises:
        NotACell: they cannot be concatenated along the channels.
    """
    if not packed.x:
        raise NotACell("nothing but the state enters the gates")
    for source in packed.x:
        if source.dtype != packed.x[0].dtype:
            raise NotACell(f"its inputs have several dtypes ({packed.x[0].dtype}, {source.dtype})")
        for axis in (0, 2, 3):
            size, wanted = (v.shape[axis] if v.shape is not None else None for v in (source, h))
            broadcast = size == 1 and (axis > 0 or source.const_value is not None)
            if isinstance(size, int) and size != wanted and (broadcast or isinstance(wanted, int)):
                raise NotACell(f"{source.name} has size {size} on axis {axis}, and the state has {wanted}")
    if packed.x[0].dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise NotACell(f"its inputs are {packed.x[0].dtype}; the op computes in FLOAT or FLOAT16")
    return packed.x
