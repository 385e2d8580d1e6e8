"""Modules as notebooks have them: lifted and equal to the user's own loop."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.exporter import export_onnx, lift_states
from tests.exporter.from_module.modules import (
    STEPS,
    Dense,
    FirstFrame,
    InPlace,
    RunningMean,
    run_lifted,
    start,
    tensors_of,
)


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


class OwnDtypes(Dense):
    """Written for float32 on a GPU, with a part in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 5, dtype=torch.float32, device="cuda") if self.h is None else self.h
        self.h = self.cell(x.float() / 255, h.half().float())
        return self.head(self.h.type(torch.FloatTensor))  # type: ignore[no-any-return]


class FilledBuffer(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.randn(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.memory = self.cell(x, self.memory)
        return self.head(self.memory)  # type: ignore[no-any-return]


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
