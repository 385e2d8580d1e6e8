"""The plugin on a GPU: its enqueue, the same captured into a CUDA graph, and inside an engine.

Nothing here runs without a GPU. The engines also need TensorRT itself (the module `tensorrt`), which the
package index alone does not bring.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepcell import StepLoop
from stepcell.models.cells import conv_gru, conv_lstm
from stepcell.plugins import prepare
from stepcell.plugins.fp16_mirrors import half_map
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.kernels.store import images_for
from stepcell.plugins.onnx.rewrite import plugin_model
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION
from stepcell.plugins.tensorrt.registry import kernels_offered, register
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of, weights_of
from stepcell.runtime import cuda
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions

CELLS = [
    "gru_x32_h64_k3x3_soft_float32",
    "gru_x3_h5_k3x3_hard_float16",
    "gru-after_x16_h32_k1x5_soft_float32",
    "lstm_x16_h32_k3x3_soft_float32",
    "lstm-channel_x3_h9_k3x3_soft_float16",
]
COMPILE = """
import sys
from pathlib import Path
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.store import images_for

for _ in images_for(CellConfig.from_label(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), pixels=300):
    pass
"""
SIZE = (2, 37, 41)
STEPS = 100
TOLERANCE = {"float32": 3e-3, "float16": 2e-2}


def gpu() -> cuda.Gpu:
    found = cuda.discover()
    if not found.devices:
        pytest.skip(f"not run: needs a GPU: {found.problem}")
    print(f"\n{found.devices[0].name}, driver for CUDA {found.driver}")
    return found.devices[0]


def kernels(cell: CellConfig, capability: str) -> tuple[KernelImage, ...]:
    """Compiled in a process of its own: in this one, other tests may have Triton interpret kernels.

    As if few pixels were expected, so that split tiles are among them.
    """
    folder = Path(os.environ.get("STEPCELL_KERNELS", "build/kernels"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, cell.label, capability, str(folder)]
    subprocess.run(command, env=environment, check=False)
    return tuple(images_for(cell, capability, folder, pixels=300))


def weights_for(cell: CellConfig) -> dict[str, np.ndarray[Any, Any]]:
    random, C = np.random.default_rng(0), cell.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "W_x": (cell.gate_count * C, cell.inputs, *cell.kernel),
        "b": (cell.gate_count * C,),
        "W_h": ((2 if cell.op == "ConvGRU" else 4) * C, C, *cell.kernel),
    }
    if cell.op == "ConvGRU":
        shapes["W_n"] = (C, C, *cell.kernel)
    shapes |= {"after": {"b_hn": (C,)}, "channel": {"w_c": (3, C, 1, 1)}}.get(cell.variant, {})
    scale = 1.5 * (cell.kernel[0] * cell.kernel[1] * max(cell.inputs, C)) ** -0.5
    return {name: (random.standard_normal(shape) * scale).astype(np.float16) for name, shape in shapes.items()}


def to_map(x: torch.Tensor) -> torch.Tensor:
    result = x.new_zeros((x.shape[0], *x.shape[2:], padded(x.shape[1])), dtype=torch.float16)
    result[..., : x.shape[1]] = x.permute(0, 2, 3, 1)
    return result


class OnDevice:
    """A plugin of a vendor's bindings, with its memory.

    Args:
        fp16_mirror: y of a step is among the inputs of the next.
    """

    def __init__(self, trt: Any, cell: CellConfig, images: tuple[KernelImage, ...], *, fp16_mirror: bool) -> None:
        register(trt)
        self.cell, (batch, height, width) = cell, SIZE
        creator = trt.get_plugin_registry().get_creator(cell.op, PLUGIN_VERSION, "stepcell")
        text = np.frombuffer(cell.label.encode() + b"\0", np.int8)
        fields = [trt.PluginField("cell", text, trt.PluginFieldType.CHAR)]
        if fp16_mirror:
            fields.append(trt.PluginField("fp16_mirror", np.ones(1, np.int32), trt.PluginFieldType.INT32))
        attributes = trt.PluginFieldCollection(fields)
        with kernels_offered({cell.label: images}):
            self.built = creator.create_plugin("cell", attributes, trt.TensorRTPhase.BUILD)
        loaded = creator.create_plugin("cell", self.built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
        self.plugin = loaded.attach_to_context(None)
        descriptions, tensors = [], inputs_of(cell, fp16_mirror=fp16_mirror)
        for tensor in (*tensors, *outputs_of(cell)):
            description = trt.PluginTensorDesc()
            channels = cell.inputs if tensor.buffer == "x" else cell.hidden
            description.dims = trt.Dims([1] if "." in tensor.buffer else [batch, channels, height, width])
            descriptions.append(description)
        self.described = descriptions[: len(tensors)], descriptions[len(tensors) :]
        self.weights = weights_for(cell)
        packed = pack(cell, self.weights)
        self.packed = [torch.from_numpy(packed[tensor.buffer]).cuda() for tensor in weights_of(cell)]
        bounds = trt.DynamicPluginTensorDesc()
        bounds.max = trt.Dims([batch, cell.hidden, height, width])
        size = self.built.get_workspace_size([bounds, bounds], [])
        self.scratch = torch.full((max(size, 1),), 255, dtype=torch.uint8, device="cuda")
        map_shape = (batch, height, width, padded(cell.hidden))
        shape = (batch, cell.hidden, height, width) if cell.state_dtype == "float32" else map_shape
        dtype = getattr(torch, cell.state_dtype)
        count = 1 if cell.op == "ConvGRU" else 2
        self.x = torch.zeros((batch, height, width, padded(cell.inputs)), dtype=torch.float16, device="cuda")
        self.old = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(count)]
        self.new = [torch.full(shape, float("nan"), dtype=dtype, device="cuda") for _ in range(count)]
        self.mirrors = [torch.zeros(map_shape, dtype=torch.float16, device="cuda")] if fp16_mirror else []
        self.y = torch.full(map_shape, float("nan"), dtype=torch.float16, device="cuda")

    def set_tactic(self, tactic: int) -> None:
        self.plugin.set_tactic(tactic)
        self.plugin.on_shape_change(*self.described)

    def enqueue(self) -> None:
        inputs = [tensor.data_ptr() for tensor in (self.x, *self.old, *self.mirrors, *self.packed)]
        outputs = [tensor.data_ptr() for tensor in (*self.new, self.y)]
        stream = torch.cuda.current_stream().cuda_stream
        self.plugin.enqueue(*self.described, inputs, outputs, self.scratch.data_ptr(), stream)

    def values(self) -> list[torch.Tensor]:
        """The new states and y as float64 (B, C, H, W)."""
        C, wide = self.cell.hidden, self.cell.state_dtype == "float32"
        states = [(each if wide else each[..., :C].permute(0, 3, 1, 2)).double() for each in self.new]
        return [*states, self.y[..., :C].permute(0, 3, 1, 2).double()]


@pytest.mark.slow
@pytest.mark.parametrize("vendor", ["tensorrt", "tensorrt_rtx", "tensorrt_lean_bindings"])
@pytest.mark.parametrize(
    ("label", "fp16_mirror"),
    [*((label, False) for label in CELLS), *((label, True) for label in CELLS if label.endswith("float32"))],
)
def test_enqueue_and_its_capture(vendor: str, label: str, fp16_mirror: bool) -> None:
    device = gpu()
    trt, cell = pytest.importorskip(vendor, exc_type=ImportError), CellConfig.from_label(label)
    it = OnDevice(trt, cell, kernels(cell, device.compute_capability), fp16_mirror=fp16_mirror)
    weights = {name: torch.from_numpy(array).cuda().double() for name, array in it.weights.items()}
    for tactic in it.built.get_valid_tactics():
        it.set_tactic(tactic)
        for state in (*it.old, *it.mirrors):
            state.zero_()
        batch, height, width = SIZE
        generator = torch.Generator().manual_seed(0)
        exact = [torch.zeros((batch, cell.hidden, height, width), dtype=torch.float64, device="cuda") for _ in it.old]
        it.enqueue()  # a capture needs a run before it, in TensorRT too
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            it.enqueue()
        worst = 0.0
        for _ in range(STEPS):
            frame = torch.randn((batch, cell.inputs, height, width), generator=generator).half().cuda()
            it.x.copy_(to_map(frame))
            results = []
            for run in (it.enqueue, graph.replay):
                for tensor in (*it.new, it.y):
                    tensor.fill_(float("nan"))
                it.scratch.fill_(255)
                run()
                torch.cuda.synchronize()
                results.append(it.values())
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), f"tactic {tactic}: replay differs"
            x, w = frame.double(), weights
            if cell.op == "ConvGRU":
                exact = [conv_gru(x, exact[0], w["W_x"], w["b"], w["W_h"], w["W_n"], w.get("b_hn"), cell.gates)]
            else:
                exact = list(conv_lstm(x, *exact, w["W_x"], w["b"], w["W_h"], w.get("w_c"), cell.gates))
            for got, wanted in zip(results[0], (*exact, exact[0]), strict=True):
                difference = ((got - wanted).abs() / wanted.abs().clamp(min=1)).nan_to_num(nan=9.0)
                worst = max(worst, float(difference.max()))
            for target, source in zip(it.old, it.new, strict=True):  # the graph's addresses are fixed
                target.copy_(source)
            for target in it.mirrors:
                target.copy_(it.y)
        for target in it.mirrors:  # as the host computes it for a state that it writes
            assert np.array_equal(half_map(it.old[0].cpu().numpy()), target.cpu().numpy())
        name = f"{label}, y given back," if fp16_mirror else label
        print(f"{vendor} {name} tactic {tactic}: worst relative difference {worst:.2e} over {STEPS} steps")
        assert worst < TOLERANCE[cell.state_dtype], f"tactic {tactic}: worst relative difference {worst:.2e}"
    it.plugin.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["off", "on", "portable", "auto"])
def test_inside_an_engine(plugin: Any, denoiser_onnx: Path, tmp_path: Path) -> None:
    gpu()
    trt = pytest.importorskip("tensorrt", reason="not run: TensorRT is not installed", exc_type=ImportError)
    if plugin == "portable" and not hasattr(trt, "QuickPluginCreationRequest"):
        pytest.skip(f"not run: TensorRT {trt.__version__} has no ahead-of-time plugins")
    options = BuildOptions(flavor="tensorrt", plugin=plugin, opt_shapes={"x": (1, 3, 128, 160)})
    info = build_engine(denoiser_onnx, tmp_path / "model.engine", options)
    print(info.contents.plugin, info.contents.fp16_mirrors)
    assert bool(info.contents.fp16_mirrors) == (plugin == "on" or (plugin == "auto" and info.contents.plugin.used))
    random, worst = np.random.default_rng(0), 0.0
    with (
        StepLoop.open(denoiser_onnx, device="cpu") as exact,
        StepLoop.open(tmp_path / "model.engine", device="cuda") as loop,
    ):
        for _ in range(STEPS):
            frame = random.random((1, 3, 128, 160), np.float32).astype(np.float16)
            wanted, got = exact.step(x=frame)["y"], loop.step(x=frame)["y"]
            worst = max(worst, float(np.abs(got.astype(np.float64) - wanted.astype(np.float64)).max()))
    print(f"--plugin {plugin}: worst difference to ONNX Runtime on the CPU {worst:.2e} over {STEPS} steps")
    assert worst < 2e-2, worst


@pytest.mark.slow
def test_an_engine_with_fp16_mirrors_equals_one_without(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after resets, for idle rows, and from a snapshot, bit by bit. Each engine chose its own tiles, so the two
    differ by roundings."""
    gpu()
    pytest.importorskip("tensorrt", reason="not run: TensorRT is not installed", exc_type=ImportError)
    options = BuildOptions(flavor="tensorrt", plugin="on", opt_shapes={"x": (3, 3, 64, 96)})
    given = build_engine(denoiser_onnx, tmp_path / "given.engine", options).contents
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "plugin_model", lambda model, _: plugin_model(model))
        made = build_engine(denoiser_onnx, tmp_path / "made.engine", options).contents
    assert (len(given.fp16_mirrors), len(made.fp16_mirrors)) == (1, 0)
    xs = np.random.default_rng(0).random((STEPS, 3, 3, 64, 96), np.float32).astype(np.float16)
    with (
        StepLoop.open(tmp_path / "given.engine", device="cuda") as loop,
        StepLoop.open(tmp_path / "made.engine", device="cuda") as other,
    ):
        worst = 0.0
        for number, x in enumerate(xs):
            if number in (30, 60):
                for each in (loop, other):
                    each.reset([False, number == 30, True])
            if number == 50:
                for each in (loop, other):
                    each.load_state({"h": each.state()["h"] * np.float32(0.5)})
            pair = [each.step(x=x)["y"].astype(np.float64) for each in (loop, other)]
            worst = max(worst, float(np.abs(pair[0] - pair[1]).max()))
        snapshot = loop.state()
        expected = [loop.step(x=x)["y"] for x in xs[:10]]
        loop.load_state(snapshot)
        for x, y in zip(xs, expected, strict=False):
            np.testing.assert_array_equal(loop.step(x=x)["y"], y)
    print(f"with the fp16 mirror and without: worst difference {worst:.2e} over {STEPS} steps")
    assert worst < 5e-3, worst
    with StepLoop.open(tmp_path / "given.engine", device="cuda", slots=3) as slots:
        busy, idle, again = (slots.attach() for _ in range(3))
        first = {slot: {"x": xs[0][:1]} for slot in (busy, idle, again)}
        slots.step_slots(first)
        kept = slots.state()["h"][idle.index].tobytes()
        for x in xs[1:10]:
            slots.step_slots({busy: {"x": x[:1]}, again: {"x": x[:1]}})
        assert slots.state()["h"][idle.index].tobytes() == kept
        late = slots.step_slots({idle: {"x": xs[1][:1]}})[idle]["y"]
        slots.reset([busy])
        slots.step_slots({busy: {"x": xs[0][:1]}})
        fresh = slots.step_slots({busy: {"x": xs[1][:1]}})[busy]["y"]
        np.testing.assert_allclose(fresh.astype(np.float64), late, atol=5e-3)  # another row of the batch
