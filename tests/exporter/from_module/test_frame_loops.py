"""States in a variable of `forward`, which loops over the frames of a clip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell.exporter import lift_states
from tests.exporter.from_module.modules import STEPS, Dense, Layer, run_lifted


class ConvCell(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs + 3, 12, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(torch.cat([x, state[0]], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class ConvLoop(nn.Module):
    """Two layers, a clip (batch, time, channels, height, width), and an output for every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([ConvCell(2), ConvCell(3)])

    def forward(self, clip: Tensor) -> Tensor:
        zeros = torch.zeros(len(clip), 3, *clip.shape[3:])
        states, found = [(zeros, zeros), (zeros, zeros)], []
        for t in range(clip.shape[1]):
            x = clip[:, t]
            for index, cell in enumerate(self.cells):
                states[index] = cell(x, states[index])
                x = states[index][0]
            found.append(x)
        return torch.stack(found, 1)


class ListLoop(Dense):
    """Time first, a state of None at the start, a list of outputs."""

    def forward(self, clip: Tensor) -> list[Tensor]:
        h, found = None, []
        for x in clip:
            h = self.cell(x, h)
            found.append(self.head(h))
        return found


LOOPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "two ConvLSTMs": (ConvLoop, (1, 4, 2, 6, 8), 1),
    "a list": (ListLoop, (3, 1, 6), 0),
    "torch.nn.LSTM": (Layer, (1, 9, 6), 1),
    "torch.nn.GRU, all frames": (lambda: Layer("GRU", last=False), (1, 2, 6), 1),
    "projected LSTM": (lambda: Layer(proj_size=3), (1, 1, 6), 1),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", LOOPS)
def test_a_state_in_a_variable_of_forward(name: str) -> None:
    make, shape, axis = LOOPS[name]
    torch.manual_seed(0)
    net = make().eval()
    (argument,) = ("clip",) if "clip" in net.forward.__code__.co_varnames else ("x",)
    model = lift_states(net, {argument: shape})
    assert 1 not in [len(spec.shape) for spec in model.inputs]
    frames = [
        torch.randn(*model.example_shapes[argument], generator=torch.Generator().manual_seed(t)) for t in range(STEPS)
    ]
    got = run_lifted(model, [frame.double() for frame in frames])
    with torch.no_grad():
        result = net(torch.stack(frames, axis))
    if isinstance(result, Tensor) and result.dim() > 2:
        result = result.unbind(axis)
    expected = result if not isinstance(result, Tensor) else [result]
    for one, other in zip(got[-len(expected) :], expected, strict=True):
        np.testing.assert_allclose(one[0], other, atol=2e-5)
