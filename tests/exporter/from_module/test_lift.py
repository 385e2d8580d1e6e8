"""States of whole modules: found, lifted, named, exported; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.exporter import export_onnx, lift_states
from tests.exporter.from_module.modules import FRAME, SHAPE, Base, C, Cell, Clip, Kept, Passed


class KeptInAList(Base):
    """A list of states, changed in place, and a feature that is only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Any] = [None, None]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.last_features = self.features(x)
        for level, cell in enumerate((self.cell, self.top)):
            x = self.memory[level] = cell(x, self.memory[level])
        return {"flow": self.head(x), "mean": x.mean((2, 3))}


class Buffer(Base):
    """A running mean in a buffer, written in place, beside the cell's own state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, C, 1, 1))

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.features(x)
        self.mean.mul_(0.9).add_(0.1 * f.mean((0, 2, 3), keepdim=True))
        h = self.cell(f - self.mean, h)
        return self.head(h), h


class Named(Base):
    """One argument per state, as Robust Video Matting has them."""

    def forward(
        self, x: Tensor, r1: Tensor | None = None, r2: Tensor | None = None, scale: float = 1.0
    ) -> list[Tensor]:
        r1 = self.cell(self.features(x), r1)
        r2 = self.top(r1, r2)
        return [scale * self.head(r2), self.head(r1), r1, r2]


class Shared(Base):
    """One cell under two names: called twice, with a state for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.top = self.cell

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, list[Tensor]]:
        states = states or [None, None]
        low = self.cell(self.features(x), states[0])
        high = self.top(low, states[1])
        return self.head(high), [low, high]


class Masked(Base):
    """An argument that may be left out and is no state."""

    def forward(self, x: Tensor, mask: Tensor | None = None, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.cell(self.features(x) * (1 if mask is None else mask), h)
        return self.head(h), h


class NoDefault(Base):
    """The state has no default and may be None."""

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.cell(self.features(x), h)
        return self.head(h), h


class Average(Base):
    """No cell at all: a state of the module's own making."""

    def forward(self, x: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.features(x)
        mean = 0.1 * f if mean is None else mean + 0.1 * (f - mean)
        return self.head(f - mean), mean


class EventCell(nn.Module):
    """A ConvLSTM over clips with hidden buffers; x already holds pre-activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_h2h = nn.Conv2d(C, 4 * C, 3, padding=1)
        self.register_buffer("prev_h", torch.zeros(1, 0, 0, 0), persistent=False)
        self.register_buffer("prev_c", torch.zeros(1, 0, 0, 0), persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        results = []
        for x in clip:
            if self.prev_h.shape[2:] != x.shape[2:] or len(self.prev_h) != len(x):
                self.prev_h = x.new_zeros(len(x), C, *x.shape[2:])
                self.prev_c = torch.zeros_like(self.prev_h)
            i, f, o, g = (self.conv_h2h(self.prev_h.detach()) + x).chunk(4, dim=1)
            self.prev_c = f.sigmoid() * self.prev_c.detach() + i.sigmoid() * g.tanh()
            self.prev_h = o.sigmoid() * self.prev_c.tanh()
            results.append(self.prev_h)
        return torch.stack(results)


class Events(nn.Module):
    """Clips [T, B, C, H, W] with a memory inside, as OpenEB's networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h = nn.Sequential(nn.Conv2d(3, 4 * C, 3, stride=2, padding=1), nn.BatchNorm2d(4 * C))
        self.timepool, self.head = EventCell(), nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.timepool(self.x2h(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.head(y.flatten(0, 1)).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


class EventGRU(nn.Module):
    """As EventCell, a ConvGRU that reads x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_rz, self.conv_f = nn.Conv2d(2 * C, 2 * C, 3, padding=1), nn.Conv2d(2 * C, C, 3, padding=1)
        self.register_buffer("prev_h", torch.zeros(1, 0, 0, 0), persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        results = []
        for x in clip:
            if self.prev_h.shape[2:] != x.shape[2:] or len(self.prev_h) != len(x):
                self.prev_h = x.new_zeros(len(x), C, *x.shape[2:])
            h = self.prev_h.detach()
            z, r = self.conv_rz(torch.cat([h, x], dim=1)).sigmoid().chunk(2, dim=1)
            self.prev_h = (1 - z) * h + z * self.conv_f(torch.cat([r * h, x], dim=1)).tanh()
            results.append(self.prev_h)
        return torch.stack(results)


class GRUEvents(Events):
    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.timepool = nn.Sequential(nn.Conv2d(3, C, 3, stride=2, padding=1)), EventGRU()  # type: ignore[assignment]


class InADict(Base):
    def forward(self, x: Tensor, state: Tensor | None = None) -> dict[str, Tensor]:
        state = self.cell(self.features(x), state)
        return {"heat": self.head(state), "state": state}


class StateFirst(Base):
    """The state comes first, has no default, and is returned first."""

    def forward(self, net: Tensor, inp: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        net = self.cell(torch.tanh(inp[:, :C]) + self.stem(flow), net)
        return net, self.head(net)


class BatchFirstClip(Clip):
    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x.transpose(0, 1), h)
        return y.transpose(0, 1), h


class Heads(nn.Module):
    """torch.nn.LSTM behind a small network, as most notebooks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Conv2d(3, C, 3, stride=4, padding=1), nn.LSTM(C, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, hc: Any = None) -> tuple[Tensor, Any]:
        y, hc = self.lstm(F.relu(self.stem(x)).mean((2, 3))[:, None], hc)
        return self.head(y[:, 0]), hc


MAP = (16, 12)


# module, shapes, state positions, expected states, outputs, stepcell ops
class LearnedStart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, C, 1, 1))

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.features(x)
        h = self.cell(f, self.start.expand(f.shape) if h is None else h)
        return self.head(h), h


CASES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, int], list[str], list[str], int]] = {
    "attribute": (Kept, SHAPE, {}, ["cell.h"], ["y"], 1),
    "list in an attribute": (KeptInAList, SHAPE, {}, ["cell.h", "top.h"], ["flow", "mean"], 2),
    "buffer in place": (Buffer, SHAPE, {}, ["h", "mean"], ["y"], 1),
    "list passed": (Passed, SHAPE, {}, ["h0", "h1"], ["y"], 2),
    "named arguments": (Named, SHAPE, {}, ["r1", "r2"], ["y0", "y1"], 2),
    "shared cell": (Shared, SHAPE, {}, ["h0", "h1"], ["y"], 2),
    "mask left out": (Masked, SHAPE, {}, ["h"], ["y"], 1),
    "mask given": (Masked, {**SHAPE, "mask": (1, 1, *MAP)}, {}, ["h"], ["y"], 1),
    "no default": (NoDefault, SHAPE, {}, ["h"], ["y"], 1),
    "no cell": (Average, SHAPE, {}, ["mean"], ["y"], 0),
    "events": (Events, {"x": (1, 2, *FRAME[1:])}, {}, ["timepool.h", "timepool.c"], ["y"], 1),
    "events, gru": (GRUEvents, {"x": (1, 2, *FRAME[1:])}, {}, ["timepool.h"], ["y"], 1),
    "in a dict": (InADict, SHAPE, {}, ["h"], ["heat"], 1),
    "state first": (
        StateFirst,
        {"net": (1, C, *MAP), "inp": (1, 6, *MAP), "flow": FRAME},
        {"net": 0},
        ["h"],
        ["y"],
        1,
    ),
    "clip": (Clip, {"x": (1, *FRAME)}, {}, ["h"], ["y"], 1),
    "clip, batch first": (BatchFirstClip, {"x": (2, 1, *FRAME[1:])}, {}, ["h"], ["y"], 1),
    "torch.nn.LSTM": (Heads, SHAPE, {}, ["h", "c"], ["y"], 2),
    "learned start": (LearnedStart, SHAPE, {}, ["h", "started"], ["y"], 1),
}


def original_outputs(net: nn.Module, frames: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    """What the user's own loop gets, frame by frame, in float32."""
    net, found, state = net.eval(), [], None
    for frame in frames:
        with torch.no_grad():
            if name in ("attribute", "list in an attribute"):
                result = net(**frame)
                found.append(result if isinstance(result, Tensor) else result["flow"])
            elif name in ("events", "events, gru"):
                found.append(net(frame["x"][None])[0])
            elif name.startswith("mask"):
                y, state = net(**frame, h=state)
                found.append(y)
            elif name == "state first":
                state, y = net(torch.zeros(len(frame["inp"]), C, *MAP) if state is None else state, **frame)
                found.append(y)
            elif name == "named arguments":
                y, _, *state = net(**frame) if state is None else net(**frame, r1=state[0], r2=state[1])
                found.append(y)
            elif name == "in a dict":
                result = net(**frame, state=state)
                state = result["state"]
                found.append(result["heat"])
            else:
                axis = {"clip": 0, "clip, batch first": 1}.get(name)
                given = {key: x if axis is None else x.unsqueeze(axis) for key, x in frame.items()}
                y, state = net(*given.values(), state)
                found.append(y if axis is None else y.squeeze(axis))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_exported_step_equals_the_users_own_loop(name: str, tmp_path: Path) -> None:
    make, shapes, positions, states, outputs, ops = CASES[name]
    torch.manual_seed(1)
    net = make()
    model = lift_states(net, shapes, returned=positions)
    assert [output.name for output in model.outputs] == outputs
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32", shapes=model.example_shapes)
    assert [state.name for state in contract.states] == states, model.describe(contract)
    assert sum(cell.op is not None for cell in contract.cells) == ops
    rng = torch.Generator().manual_seed(2)
    frames = [{k: torch.randn(s, generator=rng) for k, s in model.example_shapes.items()} for _ in range(40)]
    expected = original_outputs(net, frames, name)
    worst = 0.0
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        for frame, y in zip(frames, expected, strict=True):
            got = loop.step(**{key: x.numpy() for key, x in frame.items()})[outputs[0]]
            worst = max(worst, float(np.abs(got - y.numpy()).max()))
    print(f"{name}: {worst:.1e}")
    assert worst < 1e-5, f"{name}: off by {worst:.1e} after {len(frames)} steps"


@pytest.mark.parametrize("name", ["attribute", "list passed", "torch.nn.LSTM"])
def test_sizes_stay_dynamic_on_request(name: str, tmp_path: Path) -> None:
    make, shapes, *_ = CASES[name]
    torch.manual_seed(1)
    free = ["batch", "height", "width"]
    model = lift_states(make(), shapes, dynamic=free)
    contract = export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes, dynamic=free)
    assert contract.inputs[0].shape == ("batch", 3, "height", "width")
    expected = (2, "batch", 6) if name == "torch.nn.LSTM" else ("batch", C, "(height + 1) // 2", "(width + 1) // 2")
    assert contract.states[0].shape == expected
    assert contract.states[0].batch_axis == (1 if name == "torch.nn.LSTM" else 0)
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        loop.step(x=np.zeros((3, 3, 20, 44), np.float32))


def test_clips_of_one_stream_stay_dynamic(tmp_path: Path) -> None:
    """With a batch of 1 nothing but other sizes tells time from batch."""
    torch.manual_seed(1)
    model = lift_states(GRUEvents(), {"x": (1, 1, *FRAME[1:])}, dynamic=["batch"])
    contract = export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes, dynamic=["batch"])
    assert contract.inputs[0].shape == ("batch", *FRAME[1:])
    assert contract.states[0].shape == ("batch", C, *MAP)


def test_a_state_stays_wide_in_float16_although_the_module_hands_it_on(tmp_path: Path) -> None:
    """An update of 1e-4 per step is lost below 1 in float16; the cell's state must not pass through it."""
    torch.manual_seed(1)
    net = Kept()
    with torch.no_grad():
        for parameter in net.cell.parameters():
            parameter.zero_()
        net.cell.gates.bias[C:] = 8.0  # u = 0.99966: a slow memory
        net.cell.new.bias[:] = 3.0
    model = lift_states(net, SHAPE)
    export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes)
    with StepLoop.open(tmp_path / "m.onnx", keep_float16=True) as loop:
        for _ in range(4000):
            loop.step(x=np.zeros(FRAME, np.float16))
        got = float(loop.state()["cell.h"].mean())
    expected = np.tanh(3.0) * (1 - (1 / (1 + np.exp(-8.0))) ** 4000)
    print(f"after 4000 steps {got:.4f}, expected {expected:.4f}")
    assert abs(got - expected) < 2e-3, f"stalled at {got:.4f}, expected {expected:.4f}"


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.GRUCell(6, 8), nn.GRUCell(8, 8)

    def forward(self, x: Tensor, h1: Tensor | None = None, h2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        h1 = self.low(x, h1)
        h2 = self.high(h1, h2)
        return h2.sum(1, keepdim=True), h1, h2


@pytest.mark.parametrize(
    ("positions", "noted"),
    [
        ({"h1": 1, "h2": 2}, []),
        ({"h1": 2, "h2": 1}, [("h1", "low", "h2"), ("h2", "high", "h1")]),
    ],
)
def test_exchanged_positions_are_noted(
    positions: dict[str, int], noted: list[tuple[str, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What --state says is taken, and the graph of the cells shows the other order."""
    torch.manual_seed(0)
    shapes = {"x": (1, 6)}
    with caplog.at_level("INFO"):
        export_onnx(lift_states(TwoArguments(), shapes, returned=positions), tmp_path / "m.onnx", precision="float32")
    said = [record.getMessage() for record in caplog.records if "starts from it" in record.getMessage()]
    wanted = "note: {}: cell {} starts from it and leaves the next value of {}; if that is not meant, exchange"
    assert [text.split(" their")[0] for text in said] == [wanted.format(*each) for each in noted]


def test_the_module_is_left_as_it_is() -> None:
    net = Kept()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lift_states(net, SHAPE)
    assert net.training
    assert net.hidden is None
    assert net.seen == 0
    assert torch.get_default_dtype() == torch.float32
    assert isinstance(net.cell, Cell)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_default_dtype_of_the_process_is_not_touched() -> None:
    """The module creates its first state with torch.zeros, which must fit weights in float64 all the same."""
    seen = []

    class Watching(Base):
        def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            seen.append((torch.get_default_dtype(), x.dtype))
            grid = torch.arange(x.shape[3] // 2) / 10
            mask = (torch.zeros(1, C, 1, 1) > -1).float()
            h = self.cell(self.features(x) * mask + grid, h)
            return self.head(h), h

    lift_states(Watching(), SHAPE)
    assert set(seen) == {(torch.float32, torch.float64)}


def test_outputs_in_a_dict_beside_the_state_keep_their_keys() -> None:
    class Named(Base):
        def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
            state = self.cell(self.features(x), state)
            return {"mask": self.head(state), "heat": state}, state

    lifted = lift_states(Named().eval(), {"x": (1, 3, 8, 8)})
    assert [spec.name for spec in lifted.outputs] == ["mask", "heat"]
