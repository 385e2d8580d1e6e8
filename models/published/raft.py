"""Recurrent modules of RAFT (arXiv 2003.12039) and RAFT-Stereo (arXiv 2109.07547) as step models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepcell.contract import CellSpec, StateSpec, TensorSpec
from stepcell.models.cells import ConvGRUCell

__all__ = ["BasicUpdateBlock", "ContextConvGRU", "ContextGRUCell", "SepConvGRU", "SepConvGRUCell", "SmallUpdateBlock"]

_MAP = ("height", "width")


class SepConvGRUCell(nn.Module):
    """Two ConvGRU updates of one state per step: 1x5, then 5x1 on the updated state and the same x."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.horizontal = ConvGRUCell(input_size, hidden_size, (1, 5))
        self.vertical = ConvGRUCell(input_size, hidden_size, (5, 1))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        _, between = self.horizontal(x, h)
        y, h_next = self.vertical(x, between)
        return y, h_next


class SepConvGRU(nn.Module):
    """Step model: x (batch, Cx, height, width), one state h -> y, the new state."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", input_size, *_MAP), layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=("batch", hidden_size, *_MAP), layout="NCHW")]
        self.states = [StateSpec(name="h", shape=("batch", hidden_size, *_MAP))]
        self.cell = SepConvGRUCell(input_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h_next = self.cell(x, h)
        return y, h_next


class ContextGRUCell(nn.Module):
    """ConvGRU with a context map added to each pre-activation: a_z + c_z, a_r + c_r, a_n + c_n.

    The fused op could take the maps as 3C more input channels with identity weights at the centre tap.
    This would be exact, but nearly all of the 9C^2 k^2 products per pixel would be zeros (twice the
    arithmetic for RAFT-Stereo's 128 channels and 256 inputs), instead of three additions.
    """

    def __init__(self, input_size: int, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd one, which keeps the size of the state, got {kernel_size}")
        self.hidden_size, self.kernel_size = hidden_size, kernel_size
        joined, padding = input_size + hidden_size, kernel_size // 2
        self.gates = nn.Conv2d(joined, 2 * hidden_size, kernel_size, padding=padding)
        self.candidate = nn.Conv2d(joined, hidden_size, kernel_size, padding=padding)

    def forward(self, x: Tensor, c_z: Tensor, c_r: Tensor, c_n: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(h.dtype, torch.float32)
        state = h.to(wide)
        # Same form as the op's function, so that TensorRT fuses it into as few kernels.
        a_z, a_r = self.gates(torch.cat([x, h.to(x.dtype)], dim=1)).chunk(2, dim=1)
        z = torch.sigmoid(a_z.to(wide) + c_z.to(wide))
        r = torch.sigmoid(a_r.to(wide) + c_r.to(wide))
        a_n = self.candidate(torch.cat([x, (r * state).to(x.dtype)], dim=1))
        n = torch.tanh(a_n.to(wide) + c_n.to(wide))
        blended = state + z * (n - state)
        return blended.to(x.dtype), blended.to(h.dtype)

    def cell_spec(self, name: str) -> CellSpec:
        """Entry of this cell in the contract."""
        return CellSpec(
            name=name,
            op=None,
            hidden=self.hidden_size,
            kernel=(self.kernel_size, self.kernel_size),
            reset="before",
            reason="context maps are added inside the gates",
        )


class ContextConvGRU(nn.Module):
    """Step model: x0, x1, ... (concatenated), context maps cz, cr, cq, one state h -> y, the new state.

    Args:
        inputs: channels of each x; by default x0 and x1, with `input_size` channels together.
    """

    def __init__(
        self, input_size: int, hidden_size: int, kernel_size: int, inputs: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        channels: list[int | str] = ["split", f"{input_size} - split"] if inputs is None else list(inputs)
        # The two example sizes differ, otherwise the tracer would treat them as the same symbol.
        self.examples = {"split": input_size // 2 + 1} if inputs is None else {}
        if inputs is not None and (sum(inputs) != input_size or min(inputs) < 1):
            raise ValueError(f"inputs: expected positive numbers with sum input_dim ({input_size}), got {list(inputs)}")
        if inputs is None and input_size < 4:
            raise ValueError(f"inputs: required for an input_dim below 4, got none for {input_size}")
        self.input_size = input_size
        self.inputs = [
            TensorSpec(name=name, shape=("batch", size, *_MAP), layout="NCHW")
            for name, size in [(f"x{index}", size) for index, size in enumerate(channels)]
            + [(f"c{gate}", hidden_size) for gate in "zrq"]
        ]
        self.outputs = [TensorSpec(name="y", shape=("batch", hidden_size, *_MAP), layout="NCHW")]
        self.states = [StateSpec(name="h", shape=("batch", hidden_size, *_MAP))]
        self.cell = ContextGRUCell(input_size, hidden_size, kernel_size)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *x, c_z, c_r, c_n, h = tensors
        y, h_next = self.cell(torch.cat(x, dim=1), c_z, c_r, c_n, h)
        return y, h_next


class _UpdateBlock(nn.Module):
    """Base of both update blocks: motion features, a GRU on [context, motion], a flow head.

    inputs: corr (samples of the correlation volume), flow, inp (context); state: net; outputs: y (the
    change of the flow) and, in a BasicUpdateBlock, mask (the upsampling weights).
    """

    def __init__(self, corr: int, context: int, hidden: int, *, mask: int = 0) -> None:
        super().__init__()
        self.inputs = [
            TensorSpec(name=name, shape=("batch", size, *_MAP), layout="NCHW")
            for name, size in (("corr", corr), ("flow", 2), ("inp", context))
        ]
        self.outputs = [
            TensorSpec(name=name, shape=("batch", size, *_MAP), layout="NCHW")
            for name, size in (("y", 2), ("mask", mask))
            if size
        ]
        self.states = [StateSpec(name="net", shape=("batch", hidden, *_MAP))]


class BasicUpdateBlock(_UpdateBlock):
    """Update operator of RAFT: SepConvGRU and an upsampling mask with 9 weights for each of 8x8 pixels."""

    def __init__(self, corr: int, hidden: int) -> None:
        super().__init__(corr, hidden, hidden, mask=64 * 9)
        self.corr_convs = _relu_convs((corr, 256, 1), (256, 192, 3))
        self.flow_convs = _relu_convs((2, 128, 7), (128, 64, 3))
        self.motion = _relu_convs((192 + 64, 126, 3))
        self.cell = SepConvGRUCell(hidden + 128, hidden)
        self.flow_head = _head(hidden, 256, 2, last=3)
        self.mask_head = _head(hidden, 256, 64 * 9, last=1)

    def forward(self, corr: Tensor, flow: Tensor, inp: Tensor, net: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        motion = self.motion(torch.cat([self.corr_convs(corr), self.flow_convs(flow)], dim=1))
        y, net_next = self.cell(torch.cat([inp, motion, flow], dim=1), net)
        return self.flow_head(y), 0.25 * self.mask_head(y), net_next


class SmallUpdateBlock(_UpdateBlock):
    """Update operator of the small RAFT: one ConvGRU, 64 channels of context, no mask."""

    def __init__(self, corr: int, hidden: int) -> None:
        super().__init__(corr, 64, hidden)
        self.corr_convs = _relu_convs((corr, 96, 1))
        self.flow_convs = _relu_convs((2, 64, 7), (64, 32, 3))
        self.motion = _relu_convs((96 + 32, 80, 3))
        self.cell = ConvGRUCell(64 + 82, hidden, 3)
        self.flow_head = _head(hidden, 128, 2, last=3)

    def forward(self, corr: Tensor, flow: Tensor, inp: Tensor, net: Tensor) -> tuple[Tensor, Tensor]:
        motion = self.motion(torch.cat([self.corr_convs(corr), self.flow_convs(flow)], dim=1))
        y, net_next = self.cell(torch.cat([inp, motion, flow], dim=1), net)
        return self.flow_head(y), net_next


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def _relu_convs(*sizes: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(*(layer for size in sizes for layer in (_conv(*size), nn.ReLU())))


def _head(inputs: int, between: int, outputs: int, *, last: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, between, 3), nn.ReLU(), _conv(between, outputs, last))
