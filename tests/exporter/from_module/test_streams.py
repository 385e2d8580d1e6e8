"""The axis of the streams, where states have one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.errors import UsageError
from stepcell.exporter import export_onnx, lift_states
from tests.exporter.from_module.modules import Dense, FirstFrame, RunningMean


def test_time_first_layers_have_their_batch_on_axis_1(tmp_path: Path) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 5, 2)

        def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.rnn(x, h)  # type: ignore[no-any-return]

    model = lift_states(TimeFirst(), {"x": (1, 1, 6)}, dynamic=["batch"])
    contract = export_onnx(
        model, tmp_path / "m.onnx", precision="float32", shapes=model.example_shapes, dynamic=["batch"]
    )
    assert contract.inputs[0].shape == (1, "batch", 6)
    assert [(state.shape, state.batch_axis) for state in contract.states] == [((2, "batch", 5), 1)]
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        assert loop.step(x=np.zeros((1, 3, 6), np.float32))["y"].shape == (1, 3, 5)


class SharedMean(Dense):
    """A running mean over the rows of the batch, and a first frame that is its own predecessor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.h = self.cell(x - self.mean - (x if self.last is None else self.last), self.h)
        self.last = x
        return self.h  # type: ignore[no-any-return]


class RowsMeet(Dense):
    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h)
        self.h = self.h - 0.1 * self.h.mean(0)
        return self.h  # type: ignore[no-any-return]


class TwoByTwo(nn.Module):
    """Two layers for two streams, no more and no fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 5, 2)
        self.register_buffer("h", torch.zeros(2, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        y, self.h = self.rnn(x[None], self.h)
        return y[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "rows", "dynamic", "axes"),
    [
        (RunningMean, 2, False, [None, None, None]),
        (RunningMean, 1, True, [None, None, None]),
        (RunningMean, 1, False, [0, 0, 0]),  # one row is one stream
        (SharedMean, 1, True, [None, None, None, None]),
        (SharedMean, 1, False, [None, None, None, None]),
        (RowsMeet, 2, False, [None]),
        (TwoByTwo, 2, False, [1]),
        (FirstFrame, 2, False, [0, 0, 0]),
    ],
)
def test_the_axis_of_the_streams_is_found_by_running(
    make: type[nn.Module], rows: int, dynamic: bool, axes: list[int | None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = make().eval()
    symbols = ["batch"] if dynamic else []
    model = lift_states(net, {"x": (rows, 6)}, dynamic=symbols)
    contract = export_onnx(
        model, tmp_path / "m.onnx", precision="float32", shapes=model.example_shapes, dynamic=symbols
    )
    assert [state.batch_axis for state in contract.states] == axes
    assert any(line.startswith("streams: one") for line in model.describe(contract)) == (None in axes)
    count = 3 if dynamic else rows
    frames = torch.randn(20, count, 6, generator=torch.Generator().manual_seed(1))
    with StepLoop.open(tmp_path / "m.onnx") as loop, torch.no_grad():
        for frame in frames:
            np.testing.assert_allclose(loop.step(x=frame.numpy())["y"], net(frame), atol=1e-5)
        before = loop.state()
        if None in axes:
            with pytest.raises(UsageError, match="this model steps one stream: not every state has an axis"):
                loop.reset([True] * count)
        else:
            loop.reset([False] * (count - 1) + [True])
            for state in contract.states:
                now, then = (state.by_stream(each[state.name]) for each in (loop.state(), before))
                np.testing.assert_array_equal(now[:-1], then[:-1])
                assert not np.array_equal(now[-1], then[-1])
    if None in axes:
        with pytest.raises(UsageError, match="this model steps one stream"):
            StepLoop.open(tmp_path / "m.onnx", slots=2)
