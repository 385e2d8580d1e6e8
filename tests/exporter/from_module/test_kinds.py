"""Modules as notebooks have them: lifted and equal to the user's own loop, or refused with what to write instead."""

from __future__ import annotations

import importlib
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.errors import ExportError, ParityError, StepcellError, UsageError
from stepcell.exporter import export_onnx, lift_states
from stepcell.exporter.from_module.model import LiftedModel

STEPS = 100
DOCUMENT = Path(__file__).parents[3] / "docs/own-module.md"


class Dense(nn.Module):
    """A GRU cell over feature vectors of 6, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell: Any = nn.GRUCell(6, 5)
        self.head = nn.Linear(5, 2)
        self.h: Any = None


def start(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 5)


class InDeque(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.past: deque[Tensor] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        while len(self.past) < 2:
            self.past.append(start(x))
        self.past.append(self.cell(x, self.past[0]))
        return self.head(self.past[1])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Memory:
    h: Tensor
    name: str = "memory"


class InDataclass(Dense):
    def forward(self, x: Tensor) -> Tensor:
        self.h = Memory(self.cell(x, start(x) if self.h is None else self.h.h))
        return self.head(self.h.h)  # type: ignore[no-any-return]


class Holder:
    """An object of the user's own, changed in place."""

    h: Tensor | None = None


class InObject(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()
        self.holder.h = torch.zeros(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.holder.h = self.cell(x, self.holder.h)
        return self.head(self.holder.h)  # type: ignore[no-any-return]


class InTuple(nn.Module):
    """Made in the constructor as plain attributes, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5)
        self.hidden = (torch.zeros(1, 1, 5), torch.zeros(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y, self.hidden = self.lstm(x.unsqueeze(0), self.hidden)
        return y[0]  # type: ignore[no-any-return]


class InPlace(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.memory, Tensor)
        with torch.no_grad():
            self.memory.mul_(0.9).add_(0.1 * self.cell(x))
        return self.head(self.memory.detach())  # type: ignore[no-any-return]


class OwnDtypes(Dense):
    """Written for float32 on a GPU, with a part in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 5, dtype=torch.float32, device="cuda") if self.h is None else self.h
        self.h = self.cell(x.float() / 255, h.half().float())
        return self.head(self.h.type(torch.FloatTensor))  # type: ignore[no-any-return]


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


class FilledBuffer(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.randn(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.memory = self.cell(x, self.memory)
        return self.head(self.memory)  # type: ignore[no-any-return]


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


class Labels(Dense):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.h = self.cell(x, self.h)
        y = self.head(self.h)
        return y.argmax(1), (y.sigmoid() * 255).to(torch.uint8), y > 0


class Warped(Dense):
    """The last frame only moves what is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h, self.last = torch.zeros_like(x), torch.zeros_like(x)
        self.h = self.h * torch.tanh(x - self.last) + 0.1 * x
        self.last = x
        return self.h  # type: ignore[no-any-return]


class Compiled(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.compile(self.cell)

    @torch.compile
    def scaled(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(self.scaled(x), self.h)
        return self.head(self.h)  # type: ignore[no-any-return]


def parallel() -> nn.Module:
    return nn.DataParallel(InDeque())


def called_before() -> nn.Module:
    """It keeps a state with a graph of gradients, as after training."""
    net = InPlace()
    net.h = net.head(net.cell(torch.ones(1, 6)))
    return net


FED = {
    "deque": InDeque,
    "dataclass": InDataclass,
    "object": InObject,
    "tuple of float32": InTuple,
    "in place": InPlace,
    "first frame": FirstFrame,
    "filled buffer": FilledBuffer,
    "counters": RunningMean,
    "labels": Labels,
    "warped": Warped,
    "DataParallel": parallel,
    "called before": called_before,
}


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


@pytest.mark.parametrize("name", FED)
def test_a_step_equals_the_users_own_loop(name: str) -> None:
    torch.manual_seed(0)
    net = FED[name]()
    model = lift_states(net, {"x": (1, 6)})
    frames = [torch.randn(1, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64) for t in range(STEPS)]
    got = run_lifted(model, frames)
    net = (net.module if isinstance(net, nn.DataParallel) else net).eval()
    for t, frame in enumerate(frames):
        with torch.no_grad():
            expected = tensors_of(net(frame.float()))
        for one, other in zip(got[t], expected, strict=True):
            if other.is_floating_point():
                worst = float((one - other).abs().max())
                assert worst < 2e-5, f"{name}: off by {worst:.1e} at step {t}"
            else:
                assert one.dtype == other.dtype
                assert int((one.long() - other.long()).abs().max()) <= (other.dtype == torch.uint8)


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


class Layer(nn.Module):
    """A recurrent layer of torch over the clip; the answer is the last frame's, or those of all frames."""

    def __init__(self, kind: str = "LSTM", last: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(6, 5, 2, batch_first=True, **options)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        return y[:, -1] if self.last else y  # type: ignore[no-any-return]


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


def test_the_file_holds_both_calls_and_a_reset_of_one_stream_begins_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = FirstFrame().eval()
    model = lift_states(net, {"x": (1, 6)}, dynamic=["batch"])
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32", shapes={"x": (1, 6)}, dynamic=["batch"])
    assert [(state.name, state.shape) for state in contract.states][-1] == ("started", ("batch",))
    assert "0 before the first frame" in model.describe(contract)[-1]
    frames = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(1))
    with StepLoop.open(tmp_path / "m.onnx") as loop, torch.no_grad():
        runs = [FirstFrame().eval() for _ in range(2)]
        for run in runs:
            run.load_state_dict(net.state_dict())
        for t, frame in enumerate(frames):
            if t == 5:
                loop.reset([False, True])
                runs[1].h = runs[1].last = None
            got = loop.step(x=frame.numpy())["y"]
            for row, run in enumerate(runs):
                np.testing.assert_allclose(got[row], run(frame[row : row + 1])[0], atol=1e-5)


class Late(torch.nn.Module):
    """A number whose effect comes after every step that is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.h, self.calls = torch.nn.Linear(6, 6), None, 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.h = self.mix(x) if self.h is None or self.calls % 40 == 0 else torch.tanh(self.h + self.mix(x))
        return self.h


def test_a_number_that_may_matter_later_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    lift_states(Late(), {"x": (1, 6)})
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "calls: a Python number that changes from call to call is fixed in the file" in said


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_own_dtypes_in_a_file(precision: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = lift_states(OwnDtypes(), {"x": (1, 6)})
    with caplog.at_level("INFO"):
        contract = export_onnx(model, tmp_path / "m.onnx", precision=precision, shapes=model.example_shapes)
    assert contract.parity is not None
    noted = any("in this file they are float16" in record.getMessage() for record in caplog.records)
    assert noted == (precision == "float16")


def test_compiled_parts_and_functions_run_as_they_are_written(tmp_path: Path) -> None:
    model = lift_states(Compiled(), {"x": (1, 6)})
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32", shapes=model.example_shapes)
    assert [cell.op for cell in contract.cells] == ["stepcell::ConvGRU"]


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


class Bidirectional(Layer):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.layer(x, state)


class Ahead(nn.Module):
    """Every frame is compared with the last one of the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        return y - y[:, -1:]  # type: ignore[no-any-return]


def blocks() -> dict[str, str]:
    """The Python files that docs/own-module.md shows, by name."""
    found = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return dict(found)


def documented(file: str, name: str) -> Any:
    namespace: dict[str, Any] = {"__name__": file}
    exec(blocks()[file], namespace)  # the code that the document tells users to write
    return namespace[name]


@pytest.mark.parametrize(
    ("make", "shapes", "error", "message", "hint"),
    [
        (
            lambda: Bidirectional(bidirectional=True),
            {"x": (1, 1, 6)},
            ExportError,
            "layer is bidirectional and carries a state",
            "train with bidirectional=False",
        ),
        (lambda: Layer(bidirectional=True), {"x": (1, 4, 6)}, ExportError, "no state", "layer is a bidirectional LSTM"),
        (Ahead, {"x": (1, 4, 6)}, ExportError, "its output for frame 0 depends on later frames", "this frame"),
        (
            lambda: torch.jit.script(InPlace()),
            {"x": (1, 6)},
            ExportError,
            "InPlace: a TorchScript module",
            "stepcell export net-weights.pth --module package.module:Class",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_a_step_is_refused_with_what_to_write(
    make: Any, shapes: Any, error: type[StepcellError], message: str, hint: str
) -> None:
    with pytest.raises(error) as caught:
        lift_states(make(), shapes)
    assert message in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


BEFORE = {
    "Loop": ({"clip": (1, 3, 3, 6, 8)}, ExportError, "a variable that no submodule receives", "return y, h"),
    "Counter": ({"x": (1, 6)}, ParityError, "differs from the original module", "frames: a Python number"),
    "Past": ({"x": (1, 6)}, ExportError, "past: a state whose shape changes", "filled at the first call"),
    "Array": ({"x": (1, 6)}, ExportError, "its state is no tensor", "mean: a NumPy array that changes"),
    "Outside": ({"x": (1, 6)}, ExportError, "which share MEMORY, a global variable", "keep it in the module"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_the_documents_code_before_is_refused(name: str) -> None:
    shapes, error, message, hint = BEFORE[name]
    with pytest.raises(error) as caught:
        lift_states(documented("before", name)(), shapes)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("name", ["Loop", "Branch", "Counter", "Past", "Array", "Outside", "Rows"])
def test_the_documents_code_after_is_lifted(name: str) -> None:
    shapes = {"frame": (1, 3, 6, 8)} if name == "Loop" else {"x": (1, 6)}
    assert lift_states(documented("after", name)(), shapes).states


def test_a_branch_on_data_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before.py").write_text(blocks()["before"])
    monkeypatch.syspath_prepend(tmp_path)
    import before  # type: ignore[import-not-found]

    model = lift_states(before.Branch(), {"x": (1, 6)})
    with pytest.raises(ExportError, match=r"tracing failed: before.py, line \d+: forward chooses") as caught:
        export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes)
    assert "torch.where" in str(caught.value.hint)


class Shared(nn.Module):
    """An attribute of the class."""

    memory: ClassVar[dict[str, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.memory["h"] = torch.tanh(self.mix(x) + self.memory.get("h", 0))
        return self.memory["h"]


def around() -> nn.Module:
    """A variable of the function that makes the class."""
    kept: list[Tensor] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.mix(x) + (kept[-1] if kept else 0))
            kept[:] = [y]
            return y

    return Net()


class Numbers(nn.Module):
    """A list of Python numbers is the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.levels: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.mix(x) + torch.tensor(self.levels or [0.0] * 6, dtype=x.dtype))
        self.levels = y[0].tolist()
        return y


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) + float(np.random.rand()) + torch.rand(())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Shared, "which share Shared.memory, an attribute of the class"),
        (around, "which share kept, a variable around the class"),
        (Numbers, "levels: a Python number that changes from call to call"),
        (Noise, "forward is random in eval mode"),
    ],
)
def test_memory_that_no_tracer_sees_is_named(make: Any, says: str) -> None:
    with pytest.raises(ExportError) as caught:
        lift_states(make(), {"x": (1, 6)})
    assert says in str(caught.value)


class EveryRow(nn.Module):
    """range() of a size is fixed as len() is."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x) if h is None else h
        h = torch.stack([torch.tanh(x[row] + h[row]) for row in range(x.shape[0])])
        return h, h


class Halved(nn.Module):
    """A size computed with floats."""

    def __init__(self, how: Callable[[float], int]) -> None:
        super().__init__()
        self.how = how
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.interpolate(x, size=(self.how(x.shape[2] * 0.5), self.how(x.shape[3] * 0.5)))
        self.h = y if self.h is None else 0.9 * self.h + 0.1 * y
        return self.h


@pytest.mark.parametrize("how", [int, round])
def test_a_size_that_is_rounded_is_named(how: Callable[[float], int], tmp_path: Path) -> None:
    model = lift_states(Halved(how), {"x": (1, 3, 32, 48)}, dynamic=["height", "width"])
    with pytest.raises(StepcellError) as caught:
        export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes, dynamic=["height", "width"])
    assert re.search(rf"{Path(__file__).name}, line \d+: .*x.shape\[2\] // 2", str(caught.value.hint))


@pytest.mark.parametrize("name", ["Rows", "EveryRow"])
def test_a_size_that_the_code_fixes_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, file = EveryRow(), Path(__file__).name
    if name == "Rows":
        (tmp_path / "rows.py").write_text(blocks()["before"])
        monkeypatch.syspath_prepend(tmp_path)
        net, file = importlib.import_module("rows").Rows(), "rows.py"
    model = lift_states(net, {"x": (2, 2, 3) if name == "Rows" else (2, 6)}, dynamic=["batch"])
    with pytest.raises(StepcellError) as caught:
        export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes, dynamic=["batch"], precision="float32")
    assert re.search(
        rf"{file}, line \d+.*: len\(x\), and int\(\), round\(\) and range\(\) of a size", str(caught.value.hint)
    )
