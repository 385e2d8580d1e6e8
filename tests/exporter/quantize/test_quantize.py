"""int8 models: what they compute over fed-back steps, what they record, and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from stepcell import StepContract, StepLoop, export_onnx
from stepcell.contract import StateSpec, TensorSpec
from stepcell.errors import ContractError, ExportError, InputError, OutputError, ParityError, StepcellError, UsageError
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.quantize import qdq, quantize
from stepcell.exporter.quantize.calibrate import Calibration, Moments, calibrate
from stepcell.exporter.quantize.clip_runs import clip_steps, steps
from stepcell.exporter.quantize.flat_graph import FlatGraph, flat_graph
from stepcell.exporter.quantize.qdq import Quantizer
from stepcell.exporter.quantize.rounding import round_weight
from stepcell.models.zoo.denoiser import Denoiser
from stepcell.onnx_model import read_onnx
from stepcell.quantization import Quantization
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.layers import int8_convolutions
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.verify.clips import Clip
from tests.cli.command import call

FRAMES = 16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser in float16 with channels of very different ranges, as trained networks have them."""
    torch.manual_seed(0)
    module = Denoiser(hidden=8).eval()
    with torch.no_grad():
        module.encoder.weight *= torch.logspace(-1.5, 0.5, 8).reshape(-1, 1, 1, 1)
    path = tmp_path_factory.mktemp("quantize") / "model.onnx"
    export_onnx(module, path, pixels=None)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A moving wave with noise, which lives in the frames and not only between them."""
    path = tmp_path_factory.mktemp("clip") / "clip.npy"
    t, y, x = np.meshgrid(np.arange(FRAMES), np.arange(24), np.arange(32), indexing="ij")
    wave = 128 + 90 * np.sin((x + 2 * t) / 5) * np.cos(y / 4)
    noise = np.random.default_rng(0).normal(0, 15, (FRAMES, 24, 32, 3))
    np.save(path, np.clip(wave[..., None] + noise, 0, 255).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def made(model_path: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "int8.onnx"
    quantize(model_path, path, [str(clip)], max_loss=0.05)
    return path


def outputs(path: Path, clip: Path) -> NDArray[np.float32]:
    frames = np.load(clip).transpose(0, 3, 1, 2)[:, None].astype(np.float32) / 255
    with StepLoop.open(path) as loop:
        return np.stack([loop.step(x=frame)["y"] for frame in frames])


def test_the_loss_over_fed_back_steps_is_the_recorded_one(model_path: Path, made: Path, clip: Path) -> None:
    record = read_onnx(made).contract.quantization
    assert isinstance(record, Quantization)
    truth, found = outputs(model_path, clip)[-FRAMES // 4 :], outputs(made, clip)[-FRAMES // 4 :]
    loss = float(np.sqrt(np.mean((found - truth) ** 2)) / np.std(truth))
    print(f"loss over the last {FRAMES // 4} of {FRAMES} steps: {loss:.4f}")
    assert record.loss["y"] == pytest.approx(loss, rel=0.02)
    assert 0 < loss < 0.05


def test_only_convolutions_are_int8(made: Path) -> None:
    """ONNX Runtime makes int8 kernels of all of them, and nothing else of the graph is quantised."""
    contract = read_onnx(made).contract
    record = contract.quantization
    assert isinstance(record, Quantization)
    assert [state.dtype for state in contract.states] == ["float32"]
    assert [(cell.name, cell.op) for cell in contract.cells] == [("cell", None)]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(made.with_name("optimised.onnx"))
    onnxruntime.InferenceSession(str(made), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(made.with_name("optimised.onnx")).graph.node)
    assert kinds["QLinearConv"] == len(record.layers) == 5
    assert kinds["Conv"] == kinds["FusedConv"] == kinds["ConvInteger"] == 0
    assert kinds["Sigmoid"] == 2


def test_an_engine_computes_them_in_int8(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = BuildOptions(
        flavor="tensorrt-rtx", opt_shapes={"x": (1, 3, 24, 32)}, compute_capabilities=("8.6", "8.9", "12.0")
    )
    info = build_engine(made, tmp_path / "int8.engine", options)
    record = info.contents.contract.quantization
    assert isinstance(record, Quantization)
    assert int8_convolutions(info.contents.layers, record.layers) == set(record.layers)


def test_slots_and_snapshots(made: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(1).random((6, 1, 3, 16, 16)).astype(np.float32)
    with StepLoop.open(made) as alone, StepLoop.open(made, slots=3) as shared:
        slot, other = shared.attach("a"), shared.attach("b")
        for number, frame in enumerate(frames):
            found = shared.step_slots({slot: {"x": frame}, **({other: {"x": frames[0]}} if number % 2 else {})})
            assert np.array_equal(found[slot]["y"], alone.step(x=frame)["y"])
        alone.save(tmp_path / "s.safetensors")
        after = alone.step(x=frames[0])["y"]
    with StepLoop.open(made) as again:
        again.restore(tmp_path / "s.safetensors")
        assert np.array_equal(again.step(x=frames[0])["y"], after)


class Branches(nn.Module):
    """Convolutions whose outputs meet: groups, a concatenation, a transposed one, and one that is an output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", 3, "height", "width"), layout="NCHW", range=(0, 1))]
        shape = ("batch", 4, "height", "width")
        self.outputs = [TensorSpec(name=name, shape=shape, layout="NCHW") for name in ("y", "raw")]
        self.states = [StateSpec(name="h", shape=shape)]
        self.first, self.side = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1, bias=False)
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.pooled = nn.Conv2d(8, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.blend = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joined = torch.cat([F.relu(self.first(x)), self.side(x)], dim=1)
        middle = F.leaky_relu(self.grouped(joined), 0.1)
        new = torch.tanh(self.blend(torch.cat([self.up(F.relu(self.pooled(middle))), h], dim=1)))
        return new, self.pooled(middle), new


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlatGraph, StepContract, Clip]:
    torch.manual_seed(1)
    module = Branches().eval()
    with torch.no_grad():  # channels of very different ranges that count alike
        first, side = torch.logspace(-1, 1, 4), torch.tensor([0.3, 3.0])
        module.first.weight *= first.reshape(-1, 1, 1, 1)
        module.first.bias *= first
        module.side.weight *= side.reshape(-1, 1, 1, 1)
        read = torch.cat([first, side]).reshape(2, 1, 3).expand(2, 4, 3).reshape(8, 3, 1, 1)
        module.grouped.weight /= read
    path = tmp_path_factory.mktemp("branches") / "model.onnx"
    export_onnx(module, path, precision="float32")
    file = read_onnx(path)
    frames = np.random.default_rng(0).random((12, 1, 3, 10, 12)).astype(np.float32)
    return flat_graph(file), file.contract, Clip([{"x": frame} for frame in frames], "random")


def test_equalization_leaves_the_function_as_it_is(
    branches: tuple[FlatGraph, StepContract, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rounding only the scales of channels are left, and these cancel."""
    graph, contract, clip = branches
    quantizer = Quantizer(graph, calibrate(graph, contract, [clip], [1.0]))
    truth = run(graph.model, contract, clip)
    monkeypatch.setattr(
        qdq._Int8,
        "_int8_weight",
        lambda self, conv: (self._constant(f"{conv.output}/unrounded", self._weight(conv.node)), np.float32(0)),
    )
    names = list(graph.convolutions)
    for power, layers in ((0.5, names), (1.0, names), (1.0, names[1:])):
        model = quantizer.model(1.0, layers, power)
        assert any(node.op_type == "Mul" for node in model.graph.node), "an output that something else reads"
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                node.op_type = "Identity"
                del node.input[1:]
        found = run(model, contract, clip)
        worst = max(float(np.abs(found[name] - truth[name]).max()) for name in ("y", "raw"))
        print(f"equalization {power}: {worst:.1e}")
        assert worst < 2e-5


def test_equalization_pays_where_channels_differ(branches: tuple[FlatGraph, StepContract, Clip]) -> None:
    graph, contract, clip = branches
    quantizer = Quantizer(graph, calibrate(graph, contract, [clip], [1.0]))
    truth = run(graph.model, contract, clip)["raw"]
    error = {
        power: float(np.std(run(quantizer.model(1.0, list(graph.convolutions), power), contract, clip)["raw"] - truth))
        for power in (0.0, 0.5)
    }
    assert error[0.5] < 0.7 * error[0.0], error


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_are_rounded_for_the_values_that_come(groups: int) -> None:
    """Inputs that go together, with a mean: less error than by rounding to the nearest, and none on average."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((groups, 4096, 6)) @ rng.standard_normal((groups, 6, 36)) + rng.standard_normal(36)
    inputs = (inputs + 0.05 * rng.standard_normal(inputs.shape)).astype(np.float32)
    weight = rng.standard_normal((8 * groups, 4, 3, 3)).astype(np.float32)
    divided = rng.uniform(0.5, 2, 4 * groups).astype(np.float32)
    moments = Moments(np.zeros((groups, 36)), np.zeros((groups, 36, 36)))
    for part in np.split(inputs, 8, axis=1):
        moments.add(part)
    scaled = inputs / np.repeat(divided.reshape(groups, 1, -1), 9, axis=2)
    truth = scaled @ weight.reshape(groups, 8, 36).transpose(0, 2, 1)
    errors = {}
    for name, given in (("nearest", None), ("fitted", moments)):
        levels, scales, correction = round_weight(weight, given, divided)
        assert levels.dtype == np.int8
        assert np.abs(levels).max() == 127
        rounded = (levels * scales.reshape(-1, 1, 1, 1)).reshape(groups, 8, 36)
        errors[name] = scaled @ rounded.transpose(0, 2, 1) + correction.reshape(groups, 1, 8) - truth
    assert np.std(errors["fitted"]) < 0.5 * np.std(errors["nearest"])
    assert np.abs(errors["fitted"].mean(1)).max() < 1e-3 < np.abs(errors["nearest"].mean(1)).max()


def calibrated(model_path: Path, clip: Path) -> tuple[FlatGraph, Calibration]:
    file = read_onnx(model_path)
    wide = StepContract.from_json(file.contract.to_json().replace("float16", "float32"), check=False)
    graph = flat_graph(file)
    frames = np.load(clip).transpose(0, 3, 1, 2)[:, None].astype(np.float32) / 255
    return graph, calibrate(graph, wide, [Clip([{"x": frame} for frame in frames], "clip")], [1.0])


def test_a_layer_in_float32_keeps_the_scale_of_what_is_read_with_it(model_path: Path, clip: Path) -> None:
    """Features that go into one tensor with a state have the state's range, whoever computes them."""
    graph, calibration = calibrated(model_path, clip)
    scales = []
    for kept in ("", "encoder/Conv"):
        layers = [name for name in graph.convolutions if name != kept]
        model = Quantizer(graph, calibration).model(1.0, layers, 1.0)
        decoder = next(node for node in model.graph.node if node.name == "decoder/Conv")
        values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        scales.append(values[decoder.input[0].removesuffix("/float") + "/scale"])
    state = calibration.ranges[1.0][graph.convolutions["decoder/Conv"].input][8:].max()
    assert scales[0] == pytest.approx(state / 127, rel=1e-5)
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)


def test_features_have_the_scale_of_what_reads_them_to_the_last_bit(model_path: Path, clip: Path) -> None:
    """So their bytes are passed on: neither to floats and back, nor to the other layout and back."""
    graph, measured = calibrated(model_path, clip)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranges = {name: (each * rng.uniform(0.5, 2)).astype(np.float32) for name, each in measured.ranges[1.0].items()}
        model = Quantizer(graph, Calibration({1.0: ranges}, {}, measured.work)).model(
            1.0, list(graph.convolutions), 1.0
        )
        values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        scales = sorted({float(values[name]) for name in values if name.endswith("/int8/scale")})
        assert len(scales) > 4
        assert all(b > a * (1 + 1e-5) for a, b in itertools.pairwise(scales)), scales


def test_what_graphs_inside_nodes_read_keeps_its_values() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 1, 1)).astype(np.float32) * np.logspace(-2, 1, 4, dtype=np.float32).reshape(
        -1, 1, 1, 1
    )
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["c", "shift"], ["inner"])], "branch", [],
        [onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )  # fmt: skip
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size, 8, 8])
        for name, size in (("x", 3), ("y", 4))
    ]
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"]),
        onnx.helper.make_node("If", ["always"], ["y"], then_branch=branch, else_branch=branch),
    ]
    constants = {"w": weight, "shift": np.full(1, 0.5, np.float32), "always": np.ones((), bool)}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    flat = FlatGraph(model)
    x = rng.random((1, 3, 8, 8)).astype(np.float32)
    truth = ReferenceEvaluator(model).run(None, {"x": x})[0]
    largest = np.abs(truth - 0.5).max((0, 2, 3))
    ranges = {"x": np.abs(x).max((0, 2, 3)), "c": largest}
    model = Quantizer(flat, Calibration({1.0: ranges}, {}, {})).model(1.0, ["c"], 0.5)
    found = ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert np.abs(found - truth).max() < 0.02 * largest.max()


def run(model: onnx.ModelProto, contract: StepContract, clip: Clip, *names: str) -> dict[str, NDArray[Any]]:
    steps = [arrays for _, _, arrays in clip_steps(model.SerializeToString(), contract, [clip])]
    return {name: np.stack([arrays[name] for arrays in steps]) for name in names or ("y", "raw")}


def test_each_clip_starts_from_the_initial_states(model_path: Path, clip: Path) -> None:
    file = read_onnx(model_path)
    graph, contract = flat_graph(file), file.contract
    wide = StepContract.from_json(contract.to_json().replace("float16", "float32"), check=False)
    frames = np.load(clip).transpose(0, 3, 1, 2)[:, None].astype(np.float32) / 255
    short = Clip([{"x": frame} for frame in frames[:3]], "short")
    steps = [arrays["y"] for _, _, arrays in clip_steps(graph.model.SerializeToString(), wide, [short, short])]
    assert all(np.array_equal(a, b) for a, b in zip(steps[:3], steps[3:], strict=True))


class Slow(nn.Module):
    """A state that comes to its final values after hundreds of frames, and an output that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", 3, "height", "width"), layout="NCHW", range=(0, 1))]
        shape = ("batch", 4, "height", "width")
        self.outputs = [TensorSpec(name="y", shape=shape, layout="NCHW")]
        self.states = [StateSpec(name="h", shape=shape)]
        self.read, self.write = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = h + 0.01 * (self.read(x) - h)
        return self.write(new), new


def test_a_slow_state_loses_no_more_after_thousands_of_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_onnx(Slow().eval(), tmp_path / "slow.onnx", precision="float32")
    file = read_onnx(tmp_path / "slow.onnx")
    graph, contract = flat_graph(file), file.contract
    frames = np.random.default_rng(0).random((16, 1, 3, 10, 12)).astype(np.float32)
    given = [{"x": frame} for frame in frames]
    quantize(tmp_path / "slow.onnx", tmp_path / "int8.onnx", [given], max_loss=1.0)
    clip = Clip(given, "random")
    models = graph.model, read_onnx(tmp_path / "int8.onnx").model
    to_and_fro = [*range(16), *range(14, 0, -1)] * 40
    wide, small = (
        np.stack(
            [
                arrays["y"]
                for _, arrays in steps(OnnxSession(model.SerializeToString(), "it"), contract, clip, to_and_fro)
            ]
        )
        for model in models
    )
    errors = np.sqrt(np.mean((small - wide) ** 2, axis=(1, 2, 3, 4)))
    begin, end = (float(part.mean()) / float(wide[-100:].std()) for part in (errors[100:200], errors[-100:]))
    print(f"rms difference relative to the output after 100 steps {begin:.4f}, after {len(errors)} {end:.4f}")
    assert end < 1.5 * begin < 0.03


def test_layers_are_given_back_until_the_loss_holds(model_path: Path, clip: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = quantize(model_path, tmp_path / "a.onnx", [str(clip)], max_loss=1.0)
    assert isinstance(first.quantization, Quantization)
    target = first.quantization.loss["y"] * 0.8
    second = quantize(model_path, tmp_path / "b.onnx", [str(clip)], max_loss=target, progress=said.append)
    assert isinstance(second.quantization, Quantization)
    assert second.quantization.loss["y"] <= target
    assert 0 < len(second.quantization.layers) < 5
    assert {*second.quantization.layers, *second.quantization.kept} == set(first.quantization.layers)
    assert any("stays in float32" in line for line in said)
    third = quantize(model_path, tmp_path / "c.onnx", [str(clip)], keep=["down/Conv", "decoder/Conv"], max_loss=1.0)
    assert isinstance(third.quantization, Quantization)
    assert third.quantization.kept == ("down/Conv", "decoder/Conv")
    assert third.quantization.loss["y"] < first.quantization.loss["y"]
    with pytest.raises(ParityError, match=r"cannot be held with any of 5 layers.* without .*Conv \d") as refusal:
        quantize(model_path, tmp_path / "d.onnx", [str(clip)], max_loss=1e-9)
    assert refusal.value.exit_code == 3
    assert not (tmp_path / "d.onnx").exists()


def test_what_is_refused(model_path: Path, made: Path, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    np.save(tmp_path / "short.npy", np.load(clip)[:4])
    bad = np.load(clip).transpose(0, 3, 1, 2).astype(np.float32)
    bad[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    np.save(tmp_path / "grey.npy", np.load(clip)[..., :1])
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"someone else's")
    bare = onnx.load(model_path)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    cases: list[tuple[Any, Any, Any, dict[str, Any], type[StepcellError], str]] = [
        (model_path, target, [], {}, UsageError, "--calibrate: no clip given"),
        (model_path, target, [tmp_path / "none.npy"], {}, InputError, "none.npy"),
        (model_path, target, [tmp_path / "short.npy"], {}, UsageError, "4 frames; expected at least 8"),
        (model_path, target, [tmp_path / "nan.npy"], {}, InputError, "frame 3: x: 1 of"),
        (model_path, target, [tmp_path / "grey.npy"], {}, InputError, "the frames are"),
        (model_path, target, [clip], {"keep": ["encoder"]}, UsageError, "--keep encoder: the model has no such"),
        (model_path, model_path, [clip], {}, UsageError, "also used as the model"),
        (model_path, clip, [clip], {}, UsageError, "also used as --calibrate"),
        (model_path, foreign, [clip], {}, UsageError, "foreign.onnx"),
        (model_path, tmp_path / "none" / "out.onnx", [clip], {}, OutputError, "none"),
        (made, target, [clip], {}, ExportError, "is quantised already"),
        (tmp_path / "bare.onnx", target, [clip], {}, ContractError, "has no state contract"),
    ]
    for source, output, clips, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            quantize(source, output, list(map(str, clips)), **options)
    assert not target.exists()
    assert foreign.read_bytes() == b"someone else's"


def test_pixels_in_the_graph(model_path: Path, clip: Path, tmp_path: Path) -> None:
    assert call("fuse", model_path, "-o", tmp_path / "bytes.onnx", "--pixels", "uint8").exit_code == 0
    contract = quantize(tmp_path / "bytes.onnx", tmp_path / "int8.onnx", [str(clip)])
    assert isinstance(contract.quantization, Quantization)
    assert contract.inputs[0].dtype == contract.outputs[0].dtype == "uint8"
    assert list(contract.quantization.loss) == ["y"]
    assert 0 < contract.quantization.loss["y"] < 0.05


def test_the_command(model_path: Path, clip: Path, tmp_path: Path) -> None:
    result = call("quantize", model_path, "-o", tmp_path / "q.onnx", "--calibrate", clip, "--max-loss", 0.05)
    assert result.exit_code == 0, result.output
    assert "5 of 5 convolutions in int8; loss: y " in " ".join(result.stderr.split())
    shown = " ".join(call("inspect", tmp_path / "q.onnx").stdout.split())
    assert "int8 5 of 5 convolutions" in shown
    assert f"calibrated on clip.npy ({FRAMES} frames)" in shown
    verified = call("verify", tmp_path / "q.onnx", "--steps", 8, "--shape", "x:1x3x16x16")
    assert verified.exit_code == 0, verified.output
