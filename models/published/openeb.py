"""ConvRNN layer of OpenEB (prophesee-ai/openeb, core/temporal_modules.py) in canonical form.

An input convolution with BatchNorm (folded here) is followed by a ConvLSTM or ConvGRU cell with 3x3
kernels. The lstm adds its hidden convolution to the input convolution; if both are plain 3x3 convolutions,
this is the canonical op with the input convolution as its W_x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.dims import Dim
from stepcell.models.cell_model import CellModel
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, Gates, size_pair
from stepcell.models.unfused_cells import ModuleGRUCell, ModuleLSTMCell

__all__ = ["ConvRNNOptions", "cell_model", "conv_rnn"]

Size = int | Sequence[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
_SEPARABLE = "separable convolutions in the gates"


@dataclass(frozen=True)
class ConvRNNOptions:
    """Arguments of upstream's ConvRNN and their defaults; those from `bias` to `padding_mode` are for its input
    convolution, and `hard` is that of the cell, which upstream sets only in a cell alone.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size = 3
    stride: Size = 1
    padding: Size = 1
    dilation: Size = 1
    cell: str = "lstm"
    separable: bool = False
    separable_hidden: bool = False
    bias: bool = True
    norm: str = "BatchNorm2d"
    depth_multiplier: int = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    hard: bool = False

    def __post_init__(self) -> None:
        if self.cell not in ("lstm", "gru"):
            raise ValueError(f"cell: expected 'lstm' or 'gru', got {self.cell!r}")
        if self.norm not in ("BatchNorm2d", "InstanceNorm2d", "none"):
            raise ValueError(f"norm: expected 'BatchNorm2d', 'InstanceNorm2d' or 'none', got {self.norm!r}")
        if self.padding_mode not in get_args(PaddingMode):
            raise ValueError(f"padding_mode: expected one of {get_args(PaddingMode)}, got {self.padding_mode!r}")

    @property
    def fused(self) -> bool:
        """Whether the input convolution of an lstm becomes W_x of the canonical op."""
        geometry = [size_pair(size) for size in (self.kernel_size, self.stride, self.padding, self.dilation)]
        return (
            self.cell == "lstm"
            and geometry == [(3, 3), (1, 1), (1, 1), (1, 1)]
            and not self.separable
            and not self.separable_hidden
            and self.norm != "InstanceNorm2d"
            and (self.groups, self.padding_mode) == (1, "zeros")
        )

    @property
    def gates(self) -> Gates:
        """Activations of the cell."""
        return "hard" if self.hard else "soft"

    @property
    def map_size(self) -> tuple[Dim, Dim]:
        """Height and width after the input convolution, as expressions of those of the frame."""
        sizes = []
        for axis, symbol in enumerate(("height", "width")):
            kernel, stride, padding, dilation = (
                size_pair(size)[axis] for size in (self.kernel_size, self.stride, self.padding, self.dilation)
            )
            offset = 2 * padding - dilation * (kernel - 1) - 1 + stride
            grown = f"{symbol} + {offset}" if offset >= 0 else f"{symbol} - {-offset}"
            if stride == 1:
                sizes.append(grown if offset else symbol)
            else:
                sizes.append(f"({grown}) // {stride}" if offset else f"{symbol} // {stride}")
        return sizes[0], sizes[1]


def conv_rnn(options: ConvRNNOptions) -> CellModel:
    """Build the layer as a step model: front (the input convolution, unless fused) and cell."""
    if options.fused:
        return CellModel(
            ConvLSTMCell(options.in_channels, options.out_channels, gates=options.gates), options.in_channels
        )
    lstm = options.cell == "lstm"
    front = _input_conv(options, 4 * options.out_channels if lstm else options.in_channels)
    cell: ConvGRUCell | ModuleGRUCell | ModuleLSTMCell
    if lstm:
        kernel, stride = size_pair(options.kernel_size), size_pair(options.stride)
        kind = "separable " if options.separable else ""
        reason = f"x has a {kind}{kernel[0]}x{kernel[1]} convolution of stride {stride[0]}, h a 3x3 one"
        if options.norm == "InstanceNorm2d":
            reason = "InstanceNorm on the input convolution"
        cell = _lstm_cell(options.out_channels, reason, separable=options.separable_hidden, gates=options.gates)
    else:
        cell = _gru_cell(
            options.in_channels, options.out_channels, separable=options.separable_hidden, gates=options.gates
        )
    return CellModel(cell, options.in_channels, front=front, map_size=options.map_size)


def cell_model(target: str, arguments: Mapping[str, Any]) -> CellModel:
    """Build one of upstream's cells alone: "ConvLSTMCell" (its x is the gates' pre-activations) or "ConvGRUCell"."""
    kwargs = dict(arguments)
    separable = str(kwargs.pop("conv_func", "")).endswith("DepthWiseSeparableConv2d")
    gates: Gates = "hard" if kwargs.pop("hard", False) else "soft"
    if size_pair(kwargs.pop("kernel_size", 3)) != (3, 3):
        raise ValueError("kernel_size: expected 3 (upstream pads the cells by 1)")
    if target == "ConvLSTMCell":
        hidden = int(kwargs.pop("hidden_dim"))
        lstm = _lstm_cell(hidden, "its input is the gates' pre-activations", separable=separable, gates=gates)
        model = CellModel(lstm, 4 * hidden)
    elif target == "ConvGRUCell":
        inputs, hidden = int(kwargs.pop("in_channels")), int(kwargs.pop("out_channels"))
        dilation, padding = size_pair(kwargs.pop("dilation", 1)), size_pair(kwargs.pop("padding", 1))
        if size_pair(kwargs.pop("stride", 1)) != (1, 1) or padding != dilation:
            raise ValueError(
                "stride, padding: expected stride 1 and padding = dilation, which keep the size of the state"
            )
        model = CellModel(_gru_cell(inputs, hidden, separable=separable, gates=gates, dilation=dilation), inputs)
    else:
        raise ValueError(f"target: expected ConvRNN, ConvLSTMCell or ConvGRUCell, got {target!r}")
    if kwargs:
        raise ValueError(f"kwargs: {target} takes no {', '.join(sorted(kwargs))}")
    return model


class _InstanceNorm(nn.Module):
    """InstanceNorm2d without weights, with the statistics of the frame, in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def _lstm_cell(hidden: int, reason: str, *, separable: bool = False, gates: Gates = "soft") -> ModuleLSTMCell:
    # x is added as it is. As W_x of the op it would need a 4C x 4C identity convolution.
    conv = _separable_conv(hidden, 4 * hidden) if separable else nn.Conv2d(hidden, 4 * hidden, 3, padding=1)
    return ModuleLSTMCell(hidden, _SEPARABLE if separable else reason, map_h=conv, gates=gates)


def _gru_cell(
    inputs: int, hidden: int, *, separable: bool = False, gates: Gates = "soft", dilation: tuple[int, int] = (1, 1)
) -> ConvGRUCell | ModuleGRUCell:
    both = inputs + hidden
    if not separable and dilation == (1, 1):
        return ConvGRUCell(inputs, hidden, gates=gates)
    conv_zr: nn.Module = _separable_conv(both, 2 * hidden) if separable else nn.Conv2d(both, 2 * hidden, 3, padding=1)
    conv_n: nn.Module = nn.Conv2d(both, hidden, 3, padding=dilation, dilation=dilation)
    if separable:
        # Merged into one plain convolution, a separable one would cost about nine times as much.
        depthwise = nn.Conv2d(both, both, 3, padding=dilation, dilation=dilation, groups=both)
        conv_n = nn.Sequential(depthwise, nn.Conv2d(both, hidden, 1))
    reason = _SEPARABLE if separable else "dilated candidate convolution"
    return ModuleGRUCell(hidden, conv_zr, conv_n, reason, gates=gates, x_first=False)


def _separable_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Depthwise 3x3 convolution followed by a 1x1 convolution."""
    return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv2d(inputs, outputs, 1))


def _input_conv(options: ConvRNNOptions, outputs: int) -> nn.Module:
    kernel, stride, padding, dilation = (
        size_pair(size) for size in (options.kernel_size, options.stride, options.padding, options.dilation)
    )
    inputs, mode = options.in_channels, options.padding_mode
    if options.separable:
        middle = inputs * options.depth_multiplier
        if options.groups != 1:
            raise ValueError(f"groups: expected 1 with a separable convolution, got {options.groups}")
        depthwise = nn.Conv2d(inputs, middle, kernel, stride, padding, dilation, groups=inputs, padding_mode=mode)
        conv: nn.Module = nn.Sequential(depthwise, nn.Conv2d(middle, outputs, 1))
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, options.groups, padding_mode=mode)
    return nn.Sequential(conv, _InstanceNorm()) if options.norm == "InstanceNorm2d" else nn.Sequential(conv)
