"""Files as people export them: states whose names say nothing, layouts, values for inputs; small networks of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.errors import InputError, UsageError
from stepcell.exporter.from_onnx.fuse import FuseReport
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.size_rules import rules
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from tests.exporter.from_onnx.conftest import Adopt

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter warns of itself and of every constant it traces
STEPS = 60


def require_equal(folder: Path, pairs: Mapping[str, str], frames: Sequence[Mapping[str, Any]], **fixed: Any) -> None:
    """Step the adopted file, and the original in a loop by hand that feeds back `pairs` from zeros."""
    original = OnnxSession((folder / "a.onnx").read_bytes(), "a.onnx")
    with StepLoop.open(folder / "b.onnx") as loop:
        states: dict[str, Any] = {}
        for number, frame in enumerate(frames):
            got = loop.step(**frame)
            if not states:
                specs = {str(spec.original_input): spec for spec in loop.contract.states}
                shapes = {spec.name: loop.state()[spec.name].shape for spec in loop.contract.states}
                states = {name: np.zeros(shapes[specs[name].name], specs[name].dtype) for name in pairs}
            expected = original({**frame, **fixed, **states})
            states = {source: expected[target] for source, target in pairs.items()}
            for name, array in got.items():
                np.testing.assert_allclose(array, expected[name], atol=1e-5, rtol=0, err_msg=f"{name}, step {number}")


def noise(*shape: int, steps: int = STEPS) -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng(0).uniform(-1, 1, (steps, *shape)).astype(np.float32))


class Numbered(nn.Module):
    """An LSTM; `deeper`: its states come back with one axis more."""

    def __init__(self, *, deeper: bool = False) -> None:
        super().__init__()
        self.rnn, self.head, self.deeper = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3), deeper

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.rnn(x, (h, c))
        return (self.head(y), h.unsqueeze(0), c.unsqueeze(0)) if self.deeper else (self.head(y), h, c)


class Stacked(nn.Module):
    """Two LSTM layers with one state [1, layers, units, 2] for h and c of both, as DTLN's files have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.LSTM(6, 5, batch_first=True),
            nn.LSTM(5, 5, batch_first=True),
            nn.Linear(5, 6),
        )

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h0, c0, h1, c1 = (state[:, layer, :, part].unsqueeze(0) for layer in (0, 1) for part in (0, 1))
        y, (h0, c0) = self.first(x, (h0, c0))
        y, (h1, c1) = self.second(y, (h1, c1))
        layers = [torch.stack([h, c], -1) for h, c in ((h0[0], c0[0]), (h1[0], c1[0]))]
        return self.head(y).sigmoid() * x, torch.stack(layers, 1)


@pytest.mark.parametrize("deeper", [False, True])
def test_numbered_names(adopt: Adopt, tmp_path: Path, deeper: bool) -> None:
    zero = torch.zeros(1, 1, 5)
    inputs = {"input_1": torch.zeros(1, 1, 6), "input_2": zero, "input_3": zero}
    report = adopt(Numbered(deeper=deeper), inputs, "output_1 output_2 output_3")
    pairs = {"input_2": "output_2", "input_3": "output_3"}
    assert {s.original_input: s.original_output for s in report.contract.states} == pairs
    if deeper:
        assert "output_2 1 x 1 x 1 x 5 is reshaped to 1 x 1 x 5" in " ".join(report.notes)
    else:
        require_equal(tmp_path, pairs, [{"input_1": x} for x in noise(1, 1, 6)])


def test_all_states_of_two_layers_in_one(adopt: Adopt, tmp_path: Path) -> None:
    report = adopt(Stacked(), {"input_2": torch.zeros(1, 1, 6), "input_3": torch.zeros(1, 2, 5, 2)}, "activation stack")
    (state,) = report.contract.states
    assert (state.original_input, state.original_output, state.batch_axis) == ("input_3", "stack", 0)
    assert any("input_3 is a state, and stack its next value: LSTM" in note for note in report.notes)
    require_equal(tmp_path, {"input_3": "stack"}, [{"input_2": x} for x in noise(1, 1, 6)])


class Recurrent(nn.Module):
    """A recurrence that is no cell of the ops: h' = tanh of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Conv2d(11, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        a = self.mix(torch.cat([x, a], 1)).tanh()
        return self.head(a), a


def test_what_may_be_a_state_is_asked_for_and_stateless_says_that_none_is(adopt: Adopt) -> None:
    inputs = {"t0": torch.zeros(1, 3, 8, 8), "t1": torch.zeros(1, 8, 8, 8)}
    with pytest.raises(UsageError, match="t1: it may be a state") as caught:
        adopt(Recurrent(), inputs, "u0 u1")
    assert "--state t1=u1 or --state t1= " in str(caught.value.hint)
    assert [state.original_output for state in adopt(Recurrent(), inputs, "u0 u1", states={"t1": "u1"}).contract.states]
    report = adopt(Recurrent(), inputs, "u0 u1", stateless=True)
    assert (report.contract.states, report.warnings) == ((), ())
    with pytest.raises(UsageError, match="--stateless: no input is a state, but --state t1=u1 makes one"):
        adopt(Recurrent(), inputs, "u0 u1", stateless=True, states={"t1": "u1"})


class Whole(nn.Module):
    """A model of whole clips; with a state that is not returned if it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        y: Tensor = self.rnn(x, h)[0]
        return y


def test_a_node_that_starts_from_zeros_is_named(adopt: Adopt) -> None:
    report = adopt(Whole(), {"x": torch.zeros(1, 7, 6)}, "y", {"x": {0: "batch", 1: "time"}})
    (warning,) = report.warnings
    assert warning.startswith("GRU /rnn/GRU: starts from zeros at every call")
    assert "a model of whole clips" in warning
    report = adopt(Whole(), {"x": torch.zeros(1, 7, 6), "h0": torch.zeros(1, 1, 5)}, "y")
    assert report.warnings == (
        "h0: GRU /rnn/GRU starts from it, and its new value is no output of the file: it is data, given at every step",
    )
    report = adopt(nn.Conv2d(3, 3, 1), {"input": torch.zeros(1, 3, 4, 4)}, "output")
    assert "no input is a state" in report.warnings[0]


class Layers(nn.Module):
    """torch.nn.GRU in either layout; `centred`: the streams of a batch are compared with each other."""

    def __init__(self, layers: int, *, batch_first: bool = False, centred: bool = False) -> None:
        super().__init__()
        self.rnn, self.head, self.centred = nn.GRU(6, 5, layers, batch_first=batch_first), nn.Linear(5, 4), centred

    def forward(self, x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x - x.mean((0, 1), keepdim=True) if self.centred else x, h0)
        return self.head(y), h


@pytest.mark.parametrize(
    ("net", "x", "h", "dynamic", "axis", "streams"),
    [
        (Layers(2, batch_first=True), (2, 1, 6), (2, 2, 5), None, 1, 2),
        (Layers(2), (1, 2, 6), (2, 2, 5), None, 1, 2),
        (Layers(1), (1, 4, 6), (1, 4, 5), None, 1, 4),
        (Layers(2), (1, 3, 6), (2, 3, 5), {"x": {1: "n"}, "h0": {1: "n"}, "y": {1: "n"}, "hn": {1: "n"}}, 1, "n"),
        (Layers(1), (1, 1, 6), (1, 1, 5), None, 0, 1),
        (Layers(1, centred=True), (1, 4, 6), (1, 4, 5), None, 0, 1),
    ],
    ids=["batch first", "time first", "one layer", "dynamic", "fixed at one", "streams meet"],
)
def test_the_axis_of_the_streams_is_found_by_running(
    adopt: Adopt, tmp_path: Path, net: nn.Module, x: Any, h: Any, dynamic: Any, axis: int, streams: int | str
) -> None:
    report = adopt(net, {"x": torch.zeros(x), "h0": torch.zeros(h)}, "y hn", dynamic)
    (state,) = report.contract.states
    assert (state.batch_axis, state.streams) == (axis, streams)
    if streams != 2:
        return
    place = report.contract.inputs[0].batch_axis
    with StepLoop.open(tmp_path / "b.onnx") as loop, StepLoop.open(tmp_path / "b.onnx") as kept:
        frames = noise(*x, steps=10)
        for number, frame in enumerate(frames):
            if number == 5:
                loop.reset([True, False])
                assert not np.take(loop.state()["h"], 0, axis).any()
            one, other = loop.step(x=frame)["y"], kept.step(x=frame)["y"]
            rows = [[np.take(each, row, place) for row in (0, 1)] for each in (one, other)]
            np.testing.assert_array_equal(rows[0][1], rows[1][1])
            assert np.array_equal(rows[0][0], rows[1][0]) == (number < 5)


class Flat(nn.Module):
    """A step without a batch: its state is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(11, 5), nn.Linear(11, 5)

    def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, mem])
        gate = self.gate(both).sigmoid()
        mem = gate * mem + (1 - gate) * self.new(both).tanh()
        return mem.sum(0, keepdim=True), mem


def test_a_model_without_a_batch_steps_one_stream(adopt: Adopt, tmp_path: Path) -> None:
    report = adopt(Flat(), {"x": torch.zeros(6), "mem": torch.zeros(5)}, "y mem_out")
    assert [state.batch_axis for state in report.contract.states] == [None]
    assert "the model steps one stream, and takes neither slots nor masks" in report.notes[-1]
    require_equal(tmp_path, {"mem": "mem_out"}, [{"x": x} for x in noise(6)])
    with pytest.raises(UsageError, match=r"this model steps one stream: not every state has an axis .*: mem"):
        StepLoop.open(tmp_path / "b.onnx", slots=1)
    with StepLoop.open(tmp_path / "b.onnx") as loop:
        first = loop.step(x=noise(6)[0])["y"]
        with pytest.raises(UsageError, match="this model steps one stream"):
            loop.reset([True, False, True, False, True])
        loop.save(tmp_path / "state.safetensors")
        loop.reset()
        np.testing.assert_array_equal(loop.step(x=noise(6)[0])["y"], first)
        loop.restore(tmp_path / "state.safetensors")
        assert not np.array_equal(loop.step(x=noise(6)[0])["y"], first)


class _Resize(torch.autograd.Function):
    """Scaling by a factor that is an input, as Robust Video Matting's exporter writes it."""

    @staticmethod
    def forward(_: Any, x: Tensor, ratio: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=float(ratio[0]), mode="bilinear", recompute_scale_factor=False)

    @staticmethod
    def symbolic(g: Any, x: Any, ratio: Any) -> Any:
        empty, one = g.op("Constant", value_t=torch.empty(0)), g.op("Constant", value_t=torch.ones(2))
        scales = g.op("Concat", one, ratio, ratio, axis_i=0)
        return g.op("Resize", x, empty, scales, mode_s="linear", coordinate_transformation_mode_s="pytorch_half_pixel")


class Matting(nn.Module):
    """A ConvGRU at a size that an input sets; its first state is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 1, 1)
        self.gates, self.new = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, src: Tensor, r1i: Tensor, downsample_ratio: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(_Resize.apply(src, downsample_ratio)).relu()
        h = r1i.expand(x.shape)
        z, r = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        h = (1 - z) * h + z * self.new(torch.cat([x, r * h], 1)).tanh()
        return F.interpolate(self.head(h), src.shape[2:], mode="bilinear", align_corners=False).sigmoid(), h


def matting(adopt: Adopt, **options: Any) -> FuseReport:
    size, any_size = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "channels", 2: "height", 3: "width"}
    ends = {"src": torch.zeros(1, 3, 32, 48), "r1i": torch.zeros(1, 8, 8, 12), "downsample_ratio": torch.tensor([0.5])}
    dynamic = {"src": size, "pha": size, "r1i": any_size, "r1o": any_size}
    return adopt(Matting(), ends, "pha r1o", dynamic, **options)


@pytest.mark.parametrize(
    ("ratio", "height"), [(0.25, "(height + 4) // 8"), (0.6, "(height * 3 + 5) // 10"), (1.0, "(height + 1) // 2")]
)
def test_a_ratio_that_is_baked_in(adopt: Adopt, tmp_path: Path, ratio: float, height: str) -> None:
    report = matting(adopt, constants={"downsample_ratio": [ratio]})
    (state,) = report.contract.states
    assert state.shape[:3] == ("batch", 8, height)
    assert [spec.name for spec in report.contract.inputs] == ["src"]
    assert len(report.fused) == 1
    frames = [{"src": x} for x in noise(1, 3, 40, 60, steps=20)]
    require_equal(tmp_path, {"r1i": "r1o"}, frames, downsample_ratio=np.array([ratio], np.float32))


def test_a_ratio_without_a_value_is_asked_for(adopt: Adopt) -> None:
    with pytest.raises(UsageError, match="downsample_ratio: sizes depend on this number") as caught:
        matting(adopt)
    assert "--constant downsample_ratio=0.25" in str(caught.value.hint)


def test_a_value_that_stays_an_input(adopt: Adopt, tmp_path: Path) -> None:
    report = matting(adopt, values={"downsample_ratio": [0.5]})
    spec = report.contract.inputs[1]
    assert (spec.name, spec.value, spec.batch_axis) == ("downsample_ratio", (0.5,), None)
    frames = noise(1, 3, 40, 60, steps=4)
    with StepLoop.open(tmp_path / "b.onnx") as loop, StepLoop.open(tmp_path / "b.onnx", slots=2) as both:
        slots = [both.attach(), both.attach()]
        for one, two in zip(frames, frames[::-1], strict=True):
            plain = loop.step(src=one)["pha"]
            shared = both.step_slots({slots[0]: {"src": one}, slots[1]: {"src": two}})
            np.testing.assert_allclose(shared[slots[0]]["pha"], plain, atol=1e-6)
        np.testing.assert_array_equal(
            loop.step(src=one)["pha"].shape,
            loop.step(src=one, downsample_ratio=np.array([0.5], np.float32))["pha"].shape,
        )
        with pytest.raises(InputError, match="all streams share this input"):
            both.step_slots(
                {slots[0]: {"src": one}, slots[1]: {"src": one, "downsample_ratio": np.array([0.25], np.float32)}}
            )


def test_tensorrt_builds_it_with_the_ratio_baked_in(adopt: Adopt, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    matting(adopt, constants={"downsample_ratio": [0.25]})
    build_engine(tmp_path / "b.onnx", tmp_path / "b.engine", BuildOptions(opt_shapes={"src": (1, 3, 64, 96)}))
    assert (tmp_path / "b.engine").stat().st_size > 1000


class Steered(nn.Module):
    """A GRU with numbers of every kind without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 5)

    def forward(self, x: Tensor, h_in: Tensor, gain: Tensor, rate: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x * gain * rate.float(), torch.where(first, torch.zeros_like(h_in), h_in))
        return h * 2, h


def test_numbers_without_axes(adopt: Adopt, tmp_path: Path) -> None:
    ends = {"x": torch.zeros(1, 6), "h_in": torch.zeros(1, 5), "gain": torch.tensor(0.5), "rate": torch.tensor(3)}
    ends["first"] = torch.tensor(0, dtype=torch.bool)
    assert adopt(Steered(), ends, "y h_out").contract.states[0].original_input == "h_in"
    every = {"gain": np.float32(0.5), "rate": np.int64(3)}
    frames = [{"x": x, **every, "first": np.bool_(number % 9 == 0)} for number, x in enumerate(noise(1, 6))]
    require_equal(tmp_path, {"h_in": "h_out"}, [{k: np.asarray(v) for k, v in frame.items()} for frame in frames])
    report = adopt(Steered(), ends, "y h_out", constants={"first": [False]}, values={"gain": [0.5], "rate": [3]})
    assert [(spec.name, spec.value) for spec in report.contract.inputs[1:]] == [("gain", (0.5,)), ("rate", (3,))]
    require_equal(tmp_path, {"h_in": "h_out"}, [{"x": x} for x in noise(1, 6)], first=np.array(0, bool), **every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constants": {"speed": [1]}}, "--constant speed: no such input"),
        ({"constants": {"gain": [1, 2]}}, "--constant gain: 1 number expected, got 2"),
        ({"values": {"rate": [3.5]}}, "--value rate: expected a value of int64, got 3.5"),
        ({"values": {"h_in": [0]}}, "--value h_in: is a state"),
    ],
)
def test_values_that_do_not_fit(adopt: Adopt, options: dict[str, Any], message: str) -> None:
    ends = {"x": torch.zeros(1, 6), "h_in": torch.zeros(1, 5), "gain": torch.tensor(0.5), "rate": torch.tensor(3)}
    with pytest.raises(UsageError, match=message):
        adopt(Steered(), {**ends, "first": torch.tensor(0, dtype=torch.bool)}, "y h_out", **options)


def test_a_constant_is_in_the_graph(adopt: Adopt, tmp_path: Path) -> None:
    matting(adopt, constants={"downsample_ratio": [0.25]})
    model = onnx.load(tmp_path / "b.onnx")
    assert "downsample_ratio" not in [value.name for value in model.graph.input]
    values = [numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer if len(tensor.dims) <= 1]
    assert any(0.25 in np.ravel(value) for value in values)


def test_sizes_behind_a_ratio() -> None:
    heights = (16, 24, 32, 48, 23, 256, 384)
    values = [(height * 3 + 120) // 128 for height in heights]  # three eighths, then halved four times, rounded up
    found = rules(values, [{"height": height} for height in heights], ["height"])
    assert found[0].dim == "(height * 3 + 120) // 128"
    assert all(found[0].of(height) == (height * 3 + 120) // 128 for height in range(1, 2000))
