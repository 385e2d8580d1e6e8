"""Recurrent modules that several tests lift, and their steps in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.exporter.from_module.model import LiftedModel

STEPS = 100


class Dense(nn.Module):
    """A GRU cell over feature vectors of 6, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell: Any = nn.GRUCell(6, 5)
        self.head = nn.Linear(5, 2)
        self.h: Any = None


def start(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 5)


class InPlace(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.memory, Tensor)
        with torch.no_grad():
            self.memory.mul_(0.9).add_(0.1 * self.cell(x))
        return self.head(self.memory.detach())  # type: ignore[no-any-return]


class FirstFrame(Dense):
    """The first frame is its own predecessor, and the cell starts from a learned value."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(5))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(x.shape[0], -1) if self.h is None else self.h
        self.h = self.cell(x - (x if self.last is None else self.last), h)
        self.last = x
        return self.head(self.h)  # type: ignore[no-any-return]


class RunningMean(Dense):
    """A counter of no axes, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("frames", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.frames = self.frames + 1
        mean = torch.zeros_like(x) if self.h is None else self.h
        self.h = mean + (x - mean) / self.count
        return torch.where(self.frames % 3 == 0, self.h, x)


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def run_lifted(model: LiftedModel, frames: Sequence[Tensor]) -> list[list[Tensor]]:
    """Outputs of the step model in float64, from its own initial values."""
    model = model.double()
    states = []
    for state in model.states:
        shape = [dim for dim in state.shape if isinstance(dim, int)]
        value = torch.zeros(shape, dtype=torch.float64 if state.dtype.startswith("float") else torch.int64)
        if state.name in model.initial:
            value += model.initial[state.name].unsqueeze(state.batch_axis)
        states.append(value)
    found = []
    for frame in frames:
        with torch.no_grad():
            results = model(frame, *states)
        found.append(list(results[: len(model.outputs)]))
        states = list(results[len(model.outputs) :])
    return found


class Layer(nn.Module):
    """A recurrent layer of torch over the clip; the answer is the last frame's, or those of all frames."""

    def __init__(self, kind: str = "LSTM", last: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(6, 5, 2, batch_first=True, **options)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        return y[:, -1] if self.last else y  # type: ignore[no-any-return]


C = 4


class Cell(nn.Module):
    """Reset before update, h before x, the update gate keeps the old state."""

    def __init__(self, inputs: int = C) -> None:
        super().__init__()
        self.gates = nn.Conv2d(inputs + C, 2 * C, 3, padding=1)
        self.new = nn.Conv2d(inputs + C, C, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            h = torch.zeros(x.shape[0], C, x.shape[2], x.shape[3], device=x.device)
        r, u = torch.sigmoid(self.gates(torch.cat([h, x], dim=1))).chunk(2, dim=1)
        return u * h + (1 - u) * torch.tanh(self.new(torch.cat([r * h, x], dim=1)))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = nn.Conv2d(3, C, 3, stride=2, padding=1), Cell()
        self.top, self.head = Cell(), nn.Conv2d(C, 2, 1)
        self.drop = nn.Dropout(0.5)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.stem(x)))


class Kept(Base):
    """An attribute that is None before the first frame."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.hidden = self.cell(self.features(x), self.hidden)
        return self.head(self.hidden)  # type: ignore[no-any-return]


class Passed(Base):
    """A list of states passed and returned."""

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, list[Tensor]]:
        states = states or [None, None]
        low = self.cell(self.features(x), states[0])
        high = self.top(low, states[1])
        return self.head(high), [low, high]


class Clip(Base):
    """Sequences [T, B, C, H, W], the last state returned."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = []
        for frame in x:
            h = self.cell(self.features(frame), h)
            outputs.append(self.head(h))
        assert h is not None
        return torch.stack(outputs), h


FRAME = (1, 3, 32, 24)
SHAPE = {"x": FRAME}
