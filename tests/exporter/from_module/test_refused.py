"""Modules that cannot be a step are refused with what to write instead; the guide's code is lifted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell.errors import ExportError, ParityError, StepcellError, UsageError
from stepcell.exporter import export_onnx, lift_states
from tests.exporter.from_module.modules import FRAME, SHAPE, Base, C, Clip, InPlace, Kept, Layer, Passed

DOCUMENT = Path(__file__).parents[3] / "docs/own-module.md"


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


class NoState(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


class Random(Base):
    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.cell(F.dropout(self.features(x), training=True), h)
        return self.head(h), h


class RandomInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noisy = Random()

    def forward(self, x: Tensor, h: Tensor | None = None) -> Any:
        return self.noisy(x, h)


class Growing(Base):
    """A cache that gets longer with every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.cache.append(self.features(x))
        return self.head(torch.stack(self.cache).mean(0))  # type: ignore[no-any-return]


class Counts(Kept):
    """What it does depends on a number that no tensor holds."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.seen > 5 else 1.0)


class NeedsMore(Base):
    def forward(self, x: Tensor, h: Tensor | None, boxes: list[float]) -> tuple[Tensor, Tensor]:
        h = self.cell(self.features(x) * boxes[0], h)
        return self.head(h), h


class ReturnsNumber(Base):
    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, float, Tensor]:
        h = self.cell(self.features(x), h)
        return self.head(h), 1.0, h


class Root(Base):
    """NaN where the features are below zero, kept as a state."""

    def __init__(self) -> None:
        super().__init__()
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell((self.features(x) - 1).sqrt(), self.h)
        return self.head(self.h)


REFUSED: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, int], type[StepcellError], str]] = {
    "no state": (NoState, SHAPE, {}, ExportError, "NoState: no state"),
    "random": (Random, SHAPE, {}, ExportError, "Random: forward is random in eval mode"),
    "random inside": (RandomInside, SHAPE, {}, ExportError, "noisy: forward is random in eval mode"),
    "growing": (Growing, SHAPE, {}, ExportError, "cache: a state whose shape changes"),
    "counts": (Counts, SHAPE, {}, ParityError, "differs from the original"),
    "needs more": (NeedsMore, SHAPE, {}, ExportError, "NeedsMore: forward failed"),
    "returns a number": (ReturnsNumber, SHAPE, {}, ExportError, "forward returns a float"),
    "NaN": (Root, SHAPE, {}, ExportError, "Root: forward returns NaN for inputs of -1 to 1"),
    "no such input": (Kept, {"frame": FRAME}, {}, UsageError, "frame: forward has no such argument"),
    "no such state": (Passed, SHAPE, {"memory": 1}, UsageError, "memory: forward has no such argument"),
    "wrong position": (Passed, SHAPE, {"states": 0}, ExportError, "--state states=0: "),
    "no such position": (
        Passed,
        SHAPE,
        {"states": 9},
        ExportError,
        "states=9: forward returned 2 values, counted from 0",
    ),
    "long clip": (Clip, {"x": (4, 2, 3, 32, 24)}, {}, ExportError, "a step takes one frame"),
    "too small": (Kept, {"x": (1, 7, 32, 24)}, {}, ExportError, "Kept: forward failed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_cannot_be_lifted_is_refused_with_the_reason(name: str) -> None:
    make, shapes, positions, error, message = REFUSED[name]
    torch.manual_seed(1)
    with pytest.raises(error) as caught:
        lift_states(make(), shapes, returned=positions)
    assert message in str(caught.value), str(caught.value)


def test_a_module_that_does_something_else_at_other_sizes_is_compared_there() -> None:
    class Grows(Base):
        """At 35 rows, which the example has not, a number that no tensor holds takes part."""

        frames = 0

        def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            self.frames += 1
            h = self.cell(self.features(x), h)
            return self.head(h) * (self.frames if x.shape[2] == 35 else 1), h

    lift_states(Grows(), SHAPE)
    with pytest.raises(ParityError, match="differs from the original"):
        lift_states(Grows(), SHAPE, dynamic=["height"])


def test_dynamic_that_does_not_hold_is_refused() -> None:
    net = Kept()
    net.head = nn.Sequential(nn.Flatten(), nn.Linear(C * 16 * 12, 2))
    with pytest.raises(ExportError, match="--dynamic height: the module does not run at other sizes"):
        lift_states(net, SHAPE, dynamic=["height"])


def test_data_dependent_control_flow_is_refused(tmp_path: Path) -> None:
    class Skips(Base):
        def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if x.mean() > -100:  # always, but the tracer cannot know
                h = self.cell(self.features(x), h)
            assert h is not None
            return self.head(h), h

    model = lift_states(Skips(), SHAPE)
    with pytest.raises(ExportError, match="tracing failed"):
        export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes)
    assert not (tmp_path / "m.onnx").exists()
