"""FireNet and the event-to-video U-Net of OpenEB (prophesee-ai/openeb) as step models.

FireNet: Scheerlinck et al. 2020, as used by Chiberre et al. 2021 (stable keypoints from events).
U-Net: based on Rebecq et al. 2019 (E2VID), with a ConvRNN in every encoder and decoder.
BatchNorm is folded into the convolutions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec
from stepcell.dims import Dim
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.models.cell_model import CellModel
from stepcell.models.published.openeb import ConvRNNOptions, conv_rnn

__all__ = ["EventToVideo", "FireNet"]


class FireNet(nn.Module):
    """Step model: x (batch, cin, height, width) -> y (batch, cout, height, width).

    States h_conv3, c_conv3, h_conv4, c_conv4, each (batch, base, height, width).

    Args:
        cin: channels of the event frame.
        cout: channels of y.
        base: channels of the features, a multiple of 4.
        event_window: events of one step, in the notation of `EventWindow.parse`; OpenEB's demo uses 5 ms.
    """

    def __init__(self, cin: int = 1, cout: int = 1, base: int = 12, event_window: str = "5ms") -> None:
        super().__init__()
        if base % 4:
            raise ValueError(f"base: expected a multiple of 4, got {base}")
        self.inputs = [_events(cin, event_window)]
        self.outputs = [TensorSpec(name="y", shape=("batch", cout, "height", "width"), layout="NCHW")]
        # Upstream's names, which do not follow the order of execution.
        self.conv0, self.conv1 = _ExciteBlock(cin, base), _ExciteBlock(base, base)
        self.conv3, self.conv4 = (conv_rnn(ConvRNNOptions(base, base)) for _ in range(2))
        self.pred = nn.Conv2d(base, cout, 3, padding=1)
        self.states = [*_states("conv3", self.conv3), *_states("conv4", self.conv4)]

    def forward(self, x: Tensor, h3: Tensor, c3: Tensor, h4: Tensor, c4: Tensor) -> tuple[Tensor, ...]:
        x, h3, c3 = self.conv3(self.conv0(x), h3, c3)
        x, h4, c4 = self.conv4(self.conv1(x), h4, c4)
        return self.pred(x), h3, c3, h4, c4


class EventToVideo(nn.Module):
    """Step model: x (batch, in_channels, height, width) -> gray, flow, and the features y that both are computed from.

    States h_unet_encoders_K and h_unet_decoders_K (and c_... with lstm cells); every level down
    halves height and width, rounding down.

    Args:
        in_channels: channels of the event frame.
        out_channels: channels of `gray`.
        num_layers: levels of the U-Net.
        base: channels of the head; level K has base * 2 ** K.
        cell: "lstm" or "gru".
        event_window: events of one step, as for `FireNet`; OpenEB's demo uses 30 ms or 30,000 events,
            whichever comes first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 3,
        base: int = 4,
        cell: str = "lstm",
        event_window: str = "30ms",
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        widths = [base * 2**level for level in range(num_layers + 1)]
        self.head = nn.Conv2d(in_channels, base, 5, padding=2)
        self.encoders = nn.ModuleList(
            conv_rnn(ConvRNNOptions(below, width, cell=cell)) for below, width in itertools.pairwise(widths)
        )
        self.middle = nn.Sequential(
            _ResidualBlock(widths[-1], 2 * widths[-1]), _ResidualBlock(2 * widths[-1], 2 * widths[-1])
        )
        # The decoder of level K reads the output of the level below, with twice its channels, and the skip connection.
        decoders, below = [], 2 * widths[-1]
        for width, skip in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True):
            decoders.append(conv_rnn(ConvRNNOptions(below + skip, width, cell=cell)))
            below = width
        self.decoders = nn.ModuleList(decoders)
        self.predictor = nn.Conv2d(below, out_channels, 1)
        self.flow = nn.Conv2d(below, 2, 1)

        def maps(channels: int) -> tuple[Dim, ...]:
            return ("batch", channels, "height", "width")

        self.inputs = [_events(in_channels, event_window)]
        self.outputs = [
            TensorSpec(name="gray", shape=maps(out_channels), layout="NCHW", range=(0.0, 1.0)),
            TensorSpec(name="flow", shape=maps(2), layout="NCHW"),
            TensorSpec(name="y", shape=maps(below), layout="NCHW"),
        ]
        self.states: list[StateSpec] = []
        for index, encoder in enumerate(self.encoders):
            assert isinstance(encoder, CellModel)
            self.states += _states(f"unet_encoders_{index}", encoder, 2 ** (index + 1))
        for index, decoder in enumerate(decoders, start=1):  # upstream's decoder 0 is the middle
            self.states += _states(f"unet_decoders_{index}", decoder, 2 ** (num_layers - index))

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        remaining, updated = list(states), []

        def recur(layer: nn.Module, features: Tensor) -> Tensor:
            assert isinstance(layer, CellModel)
            own = [remaining.pop(0) for _ in layer.states]
            result, *new = layer(features, *own)
            assert isinstance(result, Tensor)
            updated.extend(new)
            return result

        y = F.relu(self.head(x))
        skips = []
        for encoder in self.encoders:
            skips.append(y)
            # Bilinear resizing to exactly half the size, without aligned corners, is the mean of 2x2 pixels.
            y = recur(encoder, F.avg_pool2d(y, 2))
        y = self.middle(y)
        for decoder in self.decoders:
            skip = skips.pop()
            grown = F.interpolate(y, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            y = recur(decoder, torch.cat([grown, skip], dim=1))
        return torch.sigmoid(self.predictor(y)), self.flow(y), y, *updated


class _ExciteBlock(nn.Module):
    """Two 3x3 convolutions with ReLU, squeeze-and-excitation (Hu et al. 2018), residual connection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.downsample = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)
        self.fc1 = nn.Conv2d(outputs, outputs // 4, 1)
        self.fc2 = nn.Conv2d(outputs // 4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        # A sum over a whole map exceeds the precision of float16.
        mean = y.to(torch.promote_types(y.dtype, torch.float32)).mean((2, 3), keepdim=True).to(y.dtype)
        y = y * torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))
        result: Tensor = y + (x if self.downsample is None else self.downsample(x))
        return result


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with ReLU, residual connection (1x1 convolution if the widths differ), ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.downsample = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _states(suffix: str, layer: CellModel, divisor: int = 1) -> Sequence[StateSpec]:
    def at(symbol: str) -> str:
        return symbol if divisor == 1 else f"{symbol} // {divisor}"

    return [
        StateSpec(name=f"{state.name}_{suffix}", shape=("batch", state.shape[1], at("height"), at("width")))
        for state in layer.states
    ]


def _events(channels: int, window: str) -> TensorSpec:
    """Event input; upstream's event_volume has one bin per channel."""
    spec = EventSpec(
        representation="event_volume", bins=channels, window=EventWindow.parse(window, subject="event_window")
    )
    return TensorSpec(name="x", shape=("batch", channels, "height", "width"), layout="NCHW", events=spec)
