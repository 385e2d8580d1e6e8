"""Recurrent cells as users write them, of every convention that the tests of recognition need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CX, C = 3, 5


def conv(inputs: int, outputs: int, kernel: Any = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding="same", **kwargs)


class Separate(nn.Module):
    """Three convolutions over [x, h]; the state is made of zeros by the cell."""

    def __init__(self, kernel: Any = 3, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.reset, self.update, self.out = (wrap(conv(CX + C, C, kernel)) for _ in range(3))

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            h = torch.zeros(x.shape[0], C, *x.shape[2:])
        both = torch.cat([x, h], dim=1)
        u, r = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
        return h * (1 - u) + torch.tanh(self.out(torch.cat([x, h * r], dim=1))) * u


class Packed(nn.Module):
    """Reset before update in one convolution over [h, x], candidate over [x, r . h], u keeps the old state."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Sequential(conv(CX + C, 2 * C), nn.Sigmoid())
        self.candidate = nn.Sequential(conv(CX + C, C), nn.Tanh())

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        if h is None:
            h = torch.zeros(x.shape[0], C, *x.shape[2:])
        r, u = self.gates(torch.cat([h, x], dim=1)).split(C, dim=1)
        h = u * h + (1 - u) * self.candidate(torch.cat([x, r * h], dim=1))
        return h, h


class StateFirst(nn.Module):
    """forward(h, x), h first in the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (conv(CX + C, C) for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.convz(hx)), torch.sigmoid(self.convr(hx))
        return (1 - z) * h + z * torch.tanh(self.convq(torch.cat([r * h, x], dim=1)))


class StateFirstNone(StateFirst):
    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        return super().forward(torch.zeros(x.shape[0], C, *x.shape[2:]) if h is None else h, x)


class Sums(nn.Module):
    """Six convolutions, no concatenation; x through 1x1 kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.wr, self.wn, self.wz = (conv(CX, C, 1) for _ in range(3))
        self.uz, self.un, self.ur = (conv(C, C, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = torch.zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        z, r = torch.sigmoid(self.wz(x) + self.uz(h)), torch.sigmoid(self.wr(x) + self.ur(h))
        return (1 - z) * h + z * torch.tanh(self.wn(x) + self.un(r * h))


class RawParameters(nn.Module):
    """Packed tensors W (3C, Cx), U (2C, C), C (C, C) and no layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U, self.C = (nn.Parameter(0.2 * torch.randn(*s, 3, 3)) for s in ((3 * C, CX), (2 * C, C), (C, C)))

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        a_z, a_r, a_n = F.conv2d(x, self.W, padding=1).chunk(3, dim=1)
        g_z, g_r = F.conv2d(h, self.U, padding=1).chunk(2, dim=1)
        z, r = torch.sigmoid(a_z + g_z), torch.sigmoid(a_r + g_r)
        return (1 - z) * h + z * torch.tanh(a_n + F.conv2d(r * h, self.C, padding=1))


class ResetAfter(nn.Module):
    """As cuDNN: r, z, n packed over x and over h, the reset gate on the hidden product, z keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h = conv(CX, 3 * C), conv(C, 3 * C)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        (a_r, a_z, a_n), (g_r, g_z, g_n) = self.x2h(x).chunk(3, dim=1), self.h2h(h).chunk(3, dim=1)
        z = torch.sigmoid(a_z + g_z)
        return (1 - z) * torch.tanh(a_n + torch.sigmoid(a_r + g_r) * g_n) + z * h


class ResetAfterJoint(nn.Module):
    """Gates over [x, h] in one convolution, the candidate in two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_zr, self.conv_x, self.conv_h = conv(CX + C, 2 * C), conv(CX, C), conv(C, C)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        z, r = torch.sigmoid(self.conv_zr(torch.cat([x, h], dim=1))).chunk(2, dim=1)
        return (1 - z) * torch.tanh(self.conv_x(x) + r * self.conv_h(h)) + z * h


class HardGates(Separate):
    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        both = torch.cat([x, h], dim=1)
        u, r = (F.hardtanh(0.5 * layer(both) + 0.5, 0, 1) for layer in (self.update, self.reset))
        return h * (1 - u) + F.hardtanh(self.out(torch.cat([x, h * r], dim=1))) * u


class PackedLSTM(nn.Module):
    """All gates of [x, h] in one convolution, in any order; returns h, (h, c)."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.conv = order, conv(CX + C, 4 * C, (1, 5))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None:
            state = tuple(torch.zeros(2, x.shape[0], C, *x.shape[2:]))  # type: ignore[assignment]
        h, c = state  # type: ignore[misc]
        a = dict(zip(self.order, self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1), strict=True))
        c = torch.sigmoid(a["f"]) * c + torch.sigmoid(a["i"]) * torch.tanh(a["g"])
        h = torch.sigmoid(a["o"]) * torch.tanh(c)
        return h, (h, c)


class Peephole(nn.Module):
    """Eight convolutions and three weights on the memory; returns the state alone."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.wxf, self.wxi, self.wxc, self.wxo = (conv(CX, C) for _ in range(4))
        self.who, self.whi, self.whf, self.whc = (conv(C, C, bias=False) for _ in range(4))
        self.wcf, self.wci, self.wco = (nn.Parameter(torch.randn(1, C, *size)) for _ in range(3))

    def forward(self, x: Tensor, state: list[Tensor] | None) -> list[Tensor]:
        h, c = state or torch.zeros(2, x.shape[0], C, *x.shape[2:])
        i = torch.sigmoid(self.wxi(x) + self.whi(h) + self.wci * c)
        f = torch.sigmoid(self.wxf(x) + self.whf(h) + self.wcf * c)
        c = f * c + i * torch.tanh(self.wxc(x) + self.whc(h))
        o = torch.sigmoid(self.wxo(x) + self.who(h) + self.wco * c)
        return [o * torch.tanh(c), c]


class Keeps(nn.Module):
    """Hidden buffers, as event cameras' networks have: x in, y out, and a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_x2h, self.conv_h2h = conv(CX, 4 * C), conv(C, 4 * C)
        self.register_buffer("prev_h", torch.zeros(1, 0, 0, 0), persistent=False)
        self.register_buffer("prev_c", torch.zeros(1, 0, 0, 0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv_x2h(x)
        if self.prev_h.shape[0] != len(x) or self.prev_h.shape[2:] != x.shape[2:]:
            self.prev_h = self.prev_c = torch.zeros(x.shape[0], C, *x.shape[2:])
        i, f, o, g = (a + self.conv_h2h(self.prev_h)).chunk(4, dim=1)
        self.prev_c = torch.sigmoid(f) * self.prev_c + torch.sigmoid(i) * torch.tanh(g)
        self.prev_h = torch.sigmoid(o) * torch.tanh(self.prev_c)
        return self.prev_h


class Dense(nn.Module):
    """A GRU of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.new = nn.Linear(CX + C, 2 * C), nn.Parameter(torch.randn(CX + C, C))

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(len(x), C) if h is None else h
        z, r = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, dim=1)
        return (1 - z) * h + z * torch.tanh(torch.cat([x, r * h], dim=1) @ self.new)


class TorchCell(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.inner = cell(CX, C)

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.inner(x, state)


class Around(nn.Module):
    """A network around a cell."""

    def __init__(self, cell: nn.Module, dense: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(2, CX) if dense else nn.Conv2d(2, CX, 3, padding=1)
        self.cell = cell
        self.head = nn.Linear(C, 2) if dense else nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        result = self.cell(torch.relu(self.stem(x)), state)
        state = result[1] if isinstance(result, tuple) and not isinstance(self.cell, TorchCell) else result
        h = state[0] if isinstance(state, (tuple, list)) else state
        return self.head(h), state


class AroundKeeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.head = nn.Conv2d(2, CX, 3, padding=1), Keeps(), nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(torch.relu(self.stem(x))))  # type: ignore[no-any-return]


class Normed(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, C)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        both = torch.cat([x, h], dim=1)
        u, r = torch.sigmoid(self.norm(self.update(both))), torch.sigmoid(self.reset(both))
        return h * (1 - u) + torch.tanh(self.out(torch.cat([x, h * r], dim=1))) * u


class Relu(Separate):
    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        both = torch.cat([x, h], dim=1)
        u, r = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
        return h * (1 - u) + torch.relu(0.3 * self.out(torch.cat([x, h * r], dim=1))) * u


class HalfHard(Separate):
    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        both = torch.cat([x, h], dim=1)
        u, r = F.hardsigmoid(self.update(both)), F.hardsigmoid(self.reset(both))
        return h * (1 - u) + torch.tanh(self.out(torch.cat([x, h * r], dim=1))) * u


class TwoPassGRU(nn.Module):
    """A horizontal and a vertical pass in one module, as RAFT's SepConvGRU."""

    def __init__(self) -> None:
        super().__init__()
        self.across, self.down = Separate((1, 3)), Separate((3, 1))

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        return self.down(x, self.across(x, h))  # type: ignore[no-any-return]


def dilated(_: nn.Module) -> nn.Module:
    return conv(CX + C, C, dilation=2)


def separable(_: nn.Module) -> nn.Module:
    return nn.Sequential(conv(CX + C, CX + C, groups=CX + C), conv(CX + C, C, 1))


class SoftenedGates(Separate):
    """Hard sigmoids of slope 1 / 6, as torch has them, beside a clamped candidate."""

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        h = x.new_zeros(x.shape[0], C, *x.shape[2:]) if h is None else h
        both = torch.cat([x, h], dim=1)
        u, r = F.hardsigmoid(self.update(both)), F.relu6(self.reset(both) + 3) / 6
        return h * (1 - u) + self.out(torch.cat([x, h * r], dim=1)).clamp(-1, 1) * u


class HardLSTM(PackedLSTM):
    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state or (x.new_zeros(x.shape[0], C, *x.shape[2:]),) * 2
        i, f, o, g = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        i, f, o = ((0.5 * gate + 0.5).clamp(0, 1) for gate in (i, f, o))
        c = f * c + i * F.hardtanh(g)
        h = o * F.hardtanh(c)
        return h, (h, c)


class Layers(nn.Module):
    """A recurrent layer of torch, stepped with sequences of one frame."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(CX, C, **options)
        self.time = 1 if self.rnn.batch_first else 0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rnn(x.unsqueeze(self.time), state)
        return y.squeeze(self.time), state
