"""From a module to numbers over many steps, in an engine with fp16 mirrors of the states and in one without.

`stepcell build` rewrites the model and writes the sidecar; the back end keeps the buffers, on a fake GPU; the plugin,
created by TensorRT-RTX's registry, launches the kernels, which Triton's interpreter runs. Only TensorRT's part is
faked: it allocates each tensor in its format and calls the nodes in order.
"""

from __future__ import annotations

import copy
import ctypes
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from stepcell.contract import StateSpec, TensorSpec
from stepcell.dims import resolve
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.plugins import prepare
from stepcell.plugins.fp16_mirrors import Fp16Mirror, half_map
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.signature import constants
from stepcell.plugins.kernels.tiles import Tile
from stepcell.plugins.onnx.rewrite import plugin_model
from stepcell.plugins.prepare import PreparedModel
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION
from stepcell.plugins.tensorrt.registry import register
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.plan import BuiltPlan
from stepcell.runtime.engine.sidecar import read_sidecar
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.interpreted_driver import InterpretedDriver, images_of, to_map
from tests.fakes.interpreted_kernels import interpreted

SIZE = (2, 5, 6)  # batch, height, width
TILE = Tile(64, 32, 32, 1)
STEPS = 16


class InTurn(nn.Module):
    """Two cells on one state, as RAFT's: along the rows, then along the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([ConvGRUCell(3, 5, (1, 3)), ConvGRUCell(3, 5, (3, 1))])
        self.inputs = [TensorSpec(name="x", shape=("batch", 3, "height", "width"), layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=("batch", 5, "height", "width"), layout="NCHW")]
        self.states = [StateSpec(name="h", shape=("batch", 5, "height", "width"))]

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for cell in self.cells:
            y, h = cell(x, h)
        return y, h


def stack() -> CellStack:
    """y of the first is read by the second only; a state that does not start at zero; h of an LSTM."""
    model = CellStack([ConvGRUCell(3, 5, reset="after"), ConvLSTMCell(5, 4, (1, 3))])
    model.initial = {"h0": torch.linspace(-0.5, 0.5, 5).reshape(5, 1, 1), "h1": torch.full((1, 1, 1), 0.3)}
    return model


# module, its fp16 mirrors, launches of a step that keeps them
MODELS: dict[str, tuple[Any, list[str], list[str]]] = {
    "one": (lambda: CellStack([ConvGRUCell(3, 5)]), ["h"], ["gru_gates", "gru_candidate"]),
    "stack": (stack, ["h0", "h1"], ["gru_after", "lstm_step"]),
    "in turn": (InTurn, ["h"], ["gru_gates", "gru_candidate"] * 2),
}


class PluginEngine(FakeEngine):
    """An engine whose cells are plugins, as TensorRT would run it.

    Args:
        driver: has the memory, and runs what the plugins launch.
        model: as TensorRT saw it.
        fields: what the plan carries for each plugin, by name of its node.
    """

    def __init__(
        self,
        driver: InterpretedDriver,
        path: Path,
        model: onnx.ModelProto,
        fields: dict[str, Any],
        sidecar: Any,
    ) -> None:
        super().__init__(driver, path, sidecar.contract, sidecar.fp16_mirrors)
        self.contract, self.driver, self.graph = sidecar.contract, driver, model.graph
        self.weights = {}
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            self.weights[tensor.name] = driver.buffer(array.nbytes)
            self.weights[tensor.name][:] = torch.from_numpy(array.view(np.uint8).copy())
        self.plugins = {}
        for node in model.graph.node:
            if node.domain:
                creator: Any = trt.get_plugin_registry().get_creator(node.op_type, PLUGIN_VERSION, "stepcell")
                made = creator.create_plugin(node.name, fields[node.name], trt.TensorRTPhase.RUNTIME)
                self.plugins[node.name] = made.attach_to_context(None)
        self.scratch = driver.buffer(1 << 20)
        self.maps: dict[str, Tensor] = {}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return resolve({**self.inputs, **self.outputs}[name].shape, self.contract.bind({"x": self.shapes["x"]}))

    def _run(self, addresses: dict[str, int]) -> None:
        batch, _, height, width = self.shapes["x"]
        values = {name: address for name, address in addresses.items() if name not in ("x", "y")}
        for name in self.outputs:  # NaN: what is not written shows
            self._at(addresses[name], name, self.outputs[name].dtype)[:] = np.nan
        values["x"] = self._map("x", self.contract.inputs[0].shape[1])
        self.maps["x"][:] = (
            to_map(torch.from_numpy(self._at(addresses["x"], "x", "float16"))).view(torch.uint8).flatten()
        )
        values |= {name: weight.data_ptr() for name, weight in self.weights.items()}
        for node in self.graph.node:
            if node.op_type == "Identity":
                (origin,), (name,), channels = node.input, node.output, self.contract.outputs[0].shape[1]
                if name not in values:
                    values[name] = self._map(name, channels)
                shape = (batch, height, width, padded(channels))
                ctypes.memmove(values[name], values[origin], 2 * math.prod(shape))
                # TensorRT does not say what a copy that it makes has in its padding.
                memory = (ctypes.c_uint16 * math.prod(shape)).from_address(values[name])
                np.frombuffer(memory, np.float16).reshape(shape)[..., channels:] = np.nan
                continue
            plugin = self.plugins[node.name]
            if node.output[-1] not in values:
                values[node.output[-1]] = self._map(node.output[-1], plugin.cell.hidden)
            if node.output[0] not in values:  # a state between two cells
                values[node.output[0]] = self._map(node.output[0], 2 * padded(plugin.cell.hidden))
            shapes = []
            for tensor in (*plugin.inputs, *plugin.outputs):
                shapes.append(trt.PluginTensorDesc())
                channels = plugin.cell.inputs if tensor.buffer == "x" else plugin.cell.hidden
                shapes[-1].dims = trt.Dims([1] if "." in tensor.buffer else [batch, channels, height, width])
            described = shapes[: len(plugin.inputs)], shapes[len(plugin.inputs) :]
            self.scratch.fill_(255)
            read, written = ([values[name] for name in names] for names in (node.input, node.output))
            plugin.enqueue(*described, read, written, self.scratch.data_ptr(), 77)
        y = self.maps["y"].view(torch.float16).view(batch, height, width, -1)
        target = self._at(addresses["y"], "y", "float16")
        target[:] = y[..., : target.shape[1]].permute(0, 3, 1, 2).numpy()

    def _map(self, name: str, channels: Any) -> int:
        """Memory of the plan's own for a tensor, of NaN."""
        batch, _, height, width = self.shapes["x"]
        if name not in self.maps:
            self.maps[name] = self.driver.buffer(batch * height * width * padded(channels) * 2)
        self.maps[name].fill_(255)
        return self.maps[name].data_ptr()


@dataclass
class Built:
    """An engine, opened, and what runs behind it."""

    backend: TensorRTBackend
    driver: InterpretedDriver
    copies: tuple[Fp16Mirror, ...]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`build(onnx, given)`: an engine with the fp16 mirrors or without."""
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    for module in ("plugin_choice", "options"):
        monkeypatch.setattr(f"stepcell.runtime.engine.{module}.plugin_unavailable", lambda *_: "")
    gpu = cuda.Gpu(0, "Fake GPU", "8.7", 1 << 30)
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((gpu,), "13.0", ""))
    monkeypatch.setattr(prepare, "_images", lambda cell, *_: images_of(cell, [TILE]))
    register(trt)

    def make(path: Path, given: bool) -> Built:
        seen: dict[str, Any] = {}

        def build_plan(library: Any, prepared: PreparedModel, **_: Any) -> BuiltPlan:
            seen["model"] = prepared.model
            for node in prepared.model.graph.node:
                if not node.domain:
                    continue
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                label = np.frombuffer(attributes["cell"] + b"\0", np.int8)
                fields = [trt.PluginField("cell", label, trt.PluginFieldType.CHAR)]
                if "fp16_mirror" in attributes:
                    number = np.array([attributes["fp16_mirror"]], np.int32)
                    fields.append(trt.PluginField("fp16_mirror", number, trt.PluginFieldType.INT32))
                creator: Any = trt.get_plugin_registry().get_creator(node.op_type, PLUGIN_VERSION, "stepcell")
                collection = trt.PluginFieldCollection(fields)
                plugin = creator.create_plugin(node.name, collection, trt.TensorRTPhase.BUILD)
                seen[node.name] = (plugin.get_fields_to_serialize(), plugin)  # the plugin owns the bytes
            return BuiltPlan(b"a plan", {}, None, (), prepared, {})

        with monkeypatch.context() as patch:
            patch.setattr("stepcell.runtime.engine.build.build_plan", build_plan)
            if not given:
                patch.setattr(prepare, "plugin_model", lambda model, _: plugin_model(model))
            engine = tmp_path / f"{given}.engine"
            shape = {"x": (SIZE[0], 3, *SIZE[1:])}
            options = BuildOptions(flavor="tensorrt", plugin="on", opt_shapes=shape)
            build_engine(path, engine, options)
        sidecar, driver = read_sidecar(engine), InterpretedDriver()
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        fields = {name: value[0] for name, value in seen.items() if name != "model"}
        runs = PluginEngine(driver, path, seen["model"], fields, sidecar)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: runs if plan == b"a plan" else None)
        monkeypatch.setattr(trt, "Runtime", lambda _: runtime)
        backend = TensorRTBackend(engine, Device("cuda", 0))
        backend.configure({"batch": SIZE[0], "height": SIZE[1], "width": SIZE[2]})
        driver.launches.clear()
        return Built(backend, driver, sidecar.fp16_mirrors)

    return make


Recorded = list[dict[str, NDArray[Any]]]


def steps_of(backend: TensorRTBackend, xs: Sequence[NDArray[np.float16]]) -> Recorded:
    """Steps with all that happens to states between them: y and the states after each step."""
    found: Recorded = []
    for number, x in enumerate(xs):
        if number == 4:
            backend.reset([False, True])
        if number == 7:
            backend.write_state({name: value * np.float32(0.5) for name, value in backend.read_state().items()})
        if number == 12:
            backend.reset()
        y = backend.step({"x": x}, idle=[0] if number == 9 else [])["y"]
        found.append({"y": y, **backend.read_state()})
    return found


def exact_steps(model: nn.Module, contract: Any, xs: Sequence[NDArray[np.float16]]) -> Recorded:
    """The same in float64."""
    names = [state.name for state in contract.states]
    shapes = contract.state_shapes({"batch": SIZE[0], "height": SIZE[1], "width": SIZE[2]})

    def initial() -> list[Tensor]:
        return [torch.from_numpy(state.initial(shapes[state.name]).copy()).double() for state in contract.states]

    states, found = initial(), list[dict[str, NDArray[Any]]]()
    with torch.no_grad():
        for number, x in enumerate(xs):
            if number == 4:
                states = [torch.stack([old[0], new[1]]) for old, new in zip(states, initial(), strict=True)]
            if number == 7:
                states = [state * 0.5 for state in states]
            if number == 12:
                states = initial()
            y, *new = model(torch.from_numpy(x).double(), *states)
            if number == 9:
                new = [torch.stack([old[0], value[1]]) for old, value in zip(states, new, strict=True)]
            states = new
            found.append({"y": y.numpy(), **{n: s.numpy() for n, s in zip(names, states, strict=True)}})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_with_fp16_mirrors_equals_one_without_and_float64(name: str, build: Any, tmp_path: Path) -> None:
    make, states, kernels = MODELS[name]
    torch.manual_seed(1)
    model, path = make(), tmp_path / "model.onnx"
    contract = export_onnx(model, path)
    exact = copy.deepcopy(model).half().double()
    random = np.random.default_rng(0)
    xs = [random.standard_normal((SIZE[0], 3, *SIZE[1:])).astype(np.float16) for _ in range(STEPS)]
    wanted = exact_steps(exact, contract, xs)
    found = {}
    for given in (False, True):
        built = build(path, given)
        assert [each.state for each in built.copies] == (states if given else [])
        found[given] = steps_of(built.backend, xs)
        launched = [launch.split()[0] for launch in built.driver.launches]
        if given:
            assert launched == kernels * STEPS
            state = built.backend.read_state()
            again = [built.backend.step({"x": x})["y"] for x in xs[:3]]
            built.backend.write_state(state)
            for x, y in zip(xs, again, strict=False):
                np.testing.assert_array_equal(built.backend.step({"x": x})["y"], y)
        else:
            assert "narrow_state" in launched
        built.backend.close()
    worst = 0.0
    for number, (with_copy, without, right) in enumerate(zip(found[True], found[False], wanted, strict=True)):
        for each, value in right.items():
            got = with_copy[each]
            if not (each == "y" and number == 9):  # what an idle row gives out is nobody's
                assert got.tobytes() == without[each].tobytes(), (
                    f"{each} of step {number} differs from the engine without"
                )
                worst = max(worst, float(np.abs(got.astype(np.float64) - value).max()))
    assert worst < 3e-3, f"worst difference to float64 over {STEPS} steps {worst:.2e}"


def test_the_host_rounds_as_the_kernel_does() -> None:
    """The fp16 mirror of a state that is written from the host, against narrow_state, bit by bit."""
    values = np.array([0.0, -0.0, 1.0, 1.00048828125, 1.00146484375, 65504.0, 65519.99, 65520.0, -1e9, 3e-8, 2.9e-8])
    values = np.concatenate([values, [6e-8, 1e-40, np.inf, -np.inf, np.nan], np.random.default_rng(0).normal(size=104)])
    state = values.astype(np.float32).reshape(2, 5, 3, 4)
    cell = CellConfig.from_label("gru_x3_h5_k3x3_soft_float32")
    out = torch.full((2, 3, 4, 8), 9.0, dtype=torch.float16)
    kernel = interpreted("narrow_state")
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter computes in numpy
        kernel[(1, 1)](torch.from_numpy(state), out, 3, 4, 24, **constants("narrow_state", cell, Tile(32, 16, 16, 1)))
    half = half_map(state)
    nan = np.isnan(half)
    assert np.array_equal(nan, np.isnan(out.numpy()))
    assert half[~nan].tobytes() == out.numpy()[~nan].tobytes()
    assert not half[..., 5:].any()
