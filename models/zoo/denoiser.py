"""Recurrent video denoiser: encoder, ConvGRU at half resolution, decoder.

It denoises a stream frame by frame. The hidden state averages static parts of the scene over time
without blurring moving ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec
from stepcell.models.cells import ConvGRUCell

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """Step model: x (batch, 3, height, width) RGB in [0, 1] -> y of the same shape.

    state h: (batch, hidden, height // 2, width // 2). Height and width are even.

    Args:
        hidden: channels of the features and of the hidden state.
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        image = ("batch", 3, "height", "width")
        self.inputs = [TensorSpec(name="x", shape=image, layout="NCHW", range=(0.0, 1.0), pad_multiple=2)]
        self.outputs = [TensorSpec(name="y", shape=image, layout="NCHW", range=(0.0, 1.0))]
        self.states = [StateSpec(name="h", shape=("batch", hidden, "height // 2", "width // 2"))]
        self.down = nn.Conv2d(3, hidden, 5, stride=2, padding=2)
        self.encoder = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.cell = ConvGRUCell(hidden, hidden, 3)
        self.decoder = nn.Conv2d(2 * hidden, hidden, 3, padding=1)
        self.up = nn.ConvTranspose2d(hidden, 3, 2, stride=2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.encoder(F.relu(self.down(x))))
        memory, h_next = self.cell(features, h)
        residual = self.up(F.relu(self.decoder(torch.cat([features, memory], dim=1))))
        return x + residual, h_next
