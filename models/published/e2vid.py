"""E2VID and FireNet: step models that reconstruct video from events.

Each step reads one event tensor (the voxel grid of a time window) and returns one grey image.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec, state_names
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell
from stepcell.models.published.e2vid_blocks import BlockType, Residual, Upsample, advance, recurrent_block

__all__ = ["EVENT_WINDOW", "E2VIDRecurrent", "FireNet", "SkipType"]

SkipType = Literal["sum", "concat", "no_skip"]
EVENT_WINDOW = "0.35events/pixel"  # as published


class FireNet(nn.Module):
    """FireNet (Scheerlinck et al. 2020): head and residual blocks at full resolution, some followed by a cell.

    inputs: x (batch, num_bins, height, width); states: `h0` (`c0`) of the head, then of each block
    followed by a cell; output: y (batch, 1, height, width), trained towards [0, 1] but not clamped.

    Args:
        kernel_size: kernel of the head's convolution; all others are 3x3.
        recurrent_after: indices of the residual blocks that are followed by a cell.
        frame_norm: whether the residual blocks have instance normalisation.
        event_window: events of one step, in the notation of `EventWindow.parse`.

    Raises:
        ValueError: an even kernel or an unknown recurrent block type.
    """

    def __init__(
        self,
        num_bins: int,
        base_num_channels: int,
        *,
        kernel_size: int = 3,
        num_residual_blocks: int = 2,
        recurrent_after: Collection[int] = (0,),
        recurrent_block_type: BlockType = "convgru",
        frame_norm: bool = False,
        event_window: str = EVENT_WINDOW,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd positive size, got {kernel_size}")
        channels = base_num_channels
        self.recurrent_after = frozenset(recurrent_after)
        self.head = nn.Conv2d(num_bins, channels, kernel_size, padding=kernel_size // 2)
        self.residuals = nn.ModuleList(Residual(channels, frame_norm=frame_norm) for _ in range(num_residual_blocks))
        count = 1 + len(self.recurrent_after & set(range(num_residual_blocks)))
        cells = [recurrent_block(recurrent_block_type, channels) for _ in range(count)]
        self.cells = nn.ModuleList(cells)
        self.prediction = nn.Conv2d(channels, 1, 1)
        self.inputs = [_events(num_bins, event_window)]
        self.outputs = [TensorSpec(name="y", shape=("batch", 1, "height", "width"), layout="NCHW", range=(0.0, 1.0))]
        self.states = [
            StateSpec(name=name, shape=("batch", channels, "height", "width"))
            for name in state_names([cell.states for cell in cells], numbered=True)
        ]

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        new_states: list[Tensor] = []
        cells = iter(self.cells)
        x = advance(next(cells), F.relu(self.head(x)), states, new_states)
        for index, residual in enumerate(self.residuals):
            x = residual(x)
            if index in self.recurrent_after:
                x = advance(next(cells), x, states, new_states)
        return self.prediction(x), *new_states


class E2VIDRecurrent(nn.Module):
    """E2VID (Rebecq et al. 2019): a U-Net with a cell after every encoder; its output is the skip connection.

    inputs: x (batch, num_bins, height, width), sizes multiples of 2 ** num_encoders; states: `h0`
    (`c0`), `h1`, ... of the encoders, each half the size of the one before; output: y (batch, 1,
    height, width) in [0, 1].

    Args:
        base_num_channels: channels of the head; every encoder doubles them.
        skip_type: how a decoder combines its input with the skip connection; "no_skip" concatenates
            too, as upstream does.
        use_upsample_conv: see `resize` of `Upsample`.
        frame_norm: whether the residual blocks have instance normalisation.
        event_window: events of one step, as for `FireNet`.

    Raises:
        ValueError: no encoders, or an unknown skip or recurrent block type.
    """

    def __init__(
        self,
        num_bins: int,
        base_num_channels: int = 32,
        *,
        num_encoders: int = 4,
        num_residual_blocks: int = 2,
        recurrent_block_type: BlockType = "convlstm",
        skip_type: SkipType = "sum",
        use_upsample_conv: bool = True,
        frame_norm: bool = False,
        event_window: str = EVENT_WINDOW,
    ) -> None:
        super().__init__()
        if num_encoders < 1:
            raise ValueError(f"num_encoders: expected at least 1, got {num_encoders}")
        if skip_type not in get_args(SkipType):
            raise ValueError(f"skip_type: expected one of {', '.join(get_args(SkipType))}, got {skip_type!r}")
        self.skip_type = skip_type
        sizes = [base_num_channels * 2**level for level in range(num_encoders + 1)]
        joined = 1 if skip_type == "sum" else 2
        cells = [recurrent_block(recurrent_block_type, size) for size in sizes[1:]]
        self.head = nn.Conv2d(num_bins, sizes[0], 5, padding=2)
        self.encoders = nn.ModuleList(nn.Conv2d(size, 2 * size, 5, stride=2, padding=2) for size in sizes[:-1])
        self.cells = nn.ModuleList(cells)
        self.residuals = nn.ModuleList(Residual(sizes[-1], frame_norm=frame_norm) for _ in range(num_residual_blocks))
        self.decoders = nn.ModuleList(
            Upsample(joined * size, size // 2, resize=use_upsample_conv) for size in reversed(sizes[1:])
        )
        self.prediction = nn.Conv2d(joined * sizes[0], 1, 1)
        self.inputs = [_events(num_bins, event_window, pad_multiple=2**num_encoders)]
        self.outputs = [TensorSpec(name="y", shape=("batch", 1, "height", "width"), layout="NCHW", range=(0.0, 1.0))]
        self.states = _pyramid(cells)

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        new_states: list[Tensor] = []
        x = F.relu(self.head(x))
        skips = [x]
        for encoder, cell in zip(self.encoders, self.cells, strict=True):
            x = advance(cell, F.relu(encoder(x)), states, new_states)
            skips.append(x)
        for residual in self.residuals:
            x = residual(x)
        for decoder in self.decoders:
            x = decoder(self._join(x, skips.pop()))
        return torch.sigmoid(self.prediction(self._join(x, skips.pop()))), *new_states

    def _join(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip if self.skip_type == "sum" else torch.cat([x, skip], dim=1)


def _events(num_bins: int, window: str, *, pad_multiple: int = 1) -> TensorSpec:
    spec = EventSpec(
        representation="voxel_grid",
        bins=num_bins,
        window=EventWindow.parse(window, subject="event_window"),
        normalise=True,
    )
    shape = ("batch", num_bins, "height", "width")
    return TensorSpec(name="x", shape=shape, layout="NCHW", pad_multiple=pad_multiple, events=spec)


def _pyramid(cells: list[ConvGRUCell | ConvLSTMCell]) -> list[StateSpec]:
    names = iter(state_names([cell.states for cell in cells], numbered=True))
    return [
        StateSpec(name=next(names), shape=("batch", cell.hidden_size, f"height // {scale}", f"width // {scale}"))
        for scale, cell in ((2 ** (level + 1), cell) for level, cell in enumerate(cells))
        for _ in cell.states
    ]
