"""Recurrent heads: dense GRU or LSTM cells on a pooled or flattened feature map.

The state is carried from frame to frame. A head that turns one frame into a sequence (rows of the
map, regions of interest) runs the whole sequence in one step, unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import TensorSpec
from stepcell.models.stack import DenseStack, GRUCell, LSTMCell

__all__ = ["ConvLSTMHead", "GRUHead", "Head"]

Head = Literal["gap", "rows", "roi"]


class _HeadModel(nn.Module):
    """Base of both heads: stacked dense cells with numbered states."""

    def __init__(self, cells: Sequence[GRUCell] | Sequence[LSTMCell]) -> None:
        super().__init__()
        self.cells = DenseStack(cells, numbered=True)
        self.states = self.cells.states


class GRUHead(_HeadModel):
    """GRU over positions of a feature map.

    inputs: x (batch, C, height, width), for "roi" also roi_indices (batch, regions), rows of the map;
    output: y (batch, positions, hidden); states: h0, h1, ...

    Args:
        input_size, hidden_size, num_layers: arguments of the GRU.
        head: "gap": one position, the mean over the map. "rows": a position per row of the map,
            features (w, c) with channels fastest. "roi": a position per region, the mean over the
            row given by roi_indices.
        map_size: (height, width) for "rows"; fixed, since input_size depends on the width and the
            length of the sequence is the height.
        regions: number of regions for "roi".

    Raises:
        ValueError: an unknown head, or input_size is not a multiple of the width.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        head: Head = "gap",
        map_size: tuple[int, int] = (14, 14),
        regions: int = 10,
    ) -> None:
        super().__init__([GRUCell(hidden_size if i else input_size, hidden_size) for i in range(num_layers)])
        self.head = head
        height, width = map_size
        shape: tuple[int | str, ...]
        if head == "rows":
            if input_size % width:
                raise ValueError(
                    f"map_size: input_size {input_size} is not a multiple of the width, got {list(map_size)}"
                )
            shape, self.positions = (input_size // width, height, width), height
        elif head in ("gap", "roi"):
            shape, self.positions = (input_size, "height", "width"), 1 if head == "gap" else regions
        else:
            raise ValueError(f"head: expected gap, rows or roi, got {head!r}")
        self.inputs = [TensorSpec(name="x", shape=("batch", *shape), layout="NCHW")]
        if head == "roi":
            self.inputs.append(TensorSpec(name="roi_indices", shape=("batch", regions), dtype="int64"))
        self.outputs = [TensorSpec(name="y", shape=("batch", self.positions, hidden_size))]

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states: Sequence[Tensor] = rest
        if self.head == "gap":
            sequence = [_mean(x, (2, 3))]
        elif self.head == "rows":
            rows = x.permute(0, 2, 3, 1)
            sequence = [rows[:, row].flatten(1) for row in range(self.positions)]
        else:
            indices, *states = rest
            rows = _mean(x, (3,))  # (batch, C, height)
            every = indices[:, None, :].expand(-1, rows.shape[1], -1)
            sequence = list(torch.gather(rows, 2, every).unbind(2))
        outputs = []
        for features in sequence:
            y, *states = self.cells(features, *states)
            outputs.append(y)
        return torch.stack(outputs, dim=1), *states


class ConvLSTMHead(_HeadModel):
    """3x3 convolution, ReLU, reduction to one vector, and an LSTM over the frames.

    inputs: x (batch, Cx, height, width); output: y (batch, hidden); states: h0, c0, h1, ...

    Args:
        input_size: channels of x.
        filters: channels of the feature map.
        hidden_size, num_layers: arguments of the LSTM.
        fc_units: outputs of a linear layer before the LSTM; None for no such layer.
        map_size: (height, width) of the map if the linear layer reads all of it (c, h, w); None if the
            map is reduced to its mean.
    """

    def __init__(
        self,
        input_size: int,
        filters: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        fc_units: int | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> None:
        first = fc_units or filters
        super().__init__([LSTMCell(hidden_size if i else first, hidden_size) for i in range(num_layers)])
        self.conv = nn.Conv2d(input_size, filters, 3, padding=1)
        self.pooled = map_size is None
        height, width = map_size or (1, 1)
        self.fc = None if fc_units is None else nn.Linear(filters * height * width, fc_units)
        shape = map_size or ("height", "width")
        self.inputs = [TensorSpec(name="x", shape=("batch", input_size, *shape), layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=("batch", hidden_size))]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        features = F.relu(self.conv(x))
        vector = _mean(features, (2, 3)) if self.pooled else features.flatten(1)
        results: tuple[Tensor, ...] = self.cells(vector if self.fc is None else self.fc(vector), *states)
        return results


def _mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean in at least float32, since the sum over a large map overflows float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).mean(axes).to(x.dtype)
