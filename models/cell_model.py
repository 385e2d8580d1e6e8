"""Step model of a single cell, canonical or unfused, with an optional module in front of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec
from stepcell.dims import Dim
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell
from stepcell.models.unfused_cells import ModuleGRUCell, ModuleLSTMCell

__all__ = ["CellModel"]


class CellModel(nn.Module):
    """Step model: x (batch, Cx, height, width) -> y, the new hidden state in x's dtype.

    Args:
        cell: the recurrent cell.
        input_size: channels of x.
        front: module applied to x before the cell.
        map_size: height and width of the states, if `front` changes them.
    """

    def __init__(
        self,
        cell: ConvGRUCell | ConvLSTMCell | ModuleGRUCell | ModuleLSTMCell,
        input_size: int,
        *,
        front: nn.Module | None = None,
        map_size: Sequence[Dim] = ("height", "width"),
    ) -> None:
        super().__init__()
        self.front, self.cell = front, cell
        shape = ("batch", cell.hidden_size, *map_size)
        self.inputs = [TensorSpec(name="x", shape=("batch", input_size, "height", "width"), layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=shape, layout="NCHW")]
        self.states = [StateSpec(name=name, shape=shape) for name in cell.states]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self.cell(x if self.front is None else self.front(x), *states)
        return results
