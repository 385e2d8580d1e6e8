"""Splitting Conv(Concat(x, h)) for the CPU: which convolutions are split, and that nothing else changes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from stepcell import StepLoop
from stepcell.errors import InputError
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell, run_sequence
from stepcell.models.zoo.denoiser import Denoiser
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.onnxruntime.backend import OrtBackend
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32
from stepcell.runtime.backends.onnxruntime.split_convolutions import split_convolutions

STEPS = 64
DYNAMIC = ("batch", "height", "width")
Array = NDArray[np.float32]


def stack_of(*cells: nn.Module) -> CellStack:
    torch.manual_seed(0)
    for cell in cells:
        for parameter in cell.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
    return CellStack(list(cells))


def export(path: Path, *cells: nn.Module, precision: str = "float32") -> Path:
    export_small(stack_of(*cells), path, precision)
    return path


def export_small(module: nn.Module, path: Path, precision: str = "float32") -> None:
    """Dynamic sizes; compared with the module at a small size, which is faster."""
    channels = module.inputs[0].shape[1]
    export_onnx(module, path, precision=precision, shapes={"x": (2, channels, 16, 16)}, dynamic=DYNAMIC)


def frames_of(count: int, *shape: int) -> Array:
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)


def simplified(path: Path, *shape: int) -> onnx.ModelProto:
    """The model that a loop for frames of this shape runs."""
    backend = OrtBackend(path, Device("cpu"), threads=1)
    assert backend._specialized is not None
    (x,) = backend.contract.inputs
    shapes = {"x": shape} | {
        state.input: backend.contract.state_shapes(backend.contract.bind({x.name: shape}))[state.name]
        for state in backend.contract.states
    }
    return backend._specialized.simplified(shapes)


def outputs(model: onnx.ModelProto, frames: Array) -> list[Array]:
    """y of every step of a hand-written loop."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found, feed = [], {}
    for tensor in session.get_inputs()[1:]:
        # In a model without known sizes, all states have the size of the frames.
        shape = [size if isinstance(size, int) else frames[0].shape[i] for i, size in enumerate(tensor.shape)]
        feed[tensor.name] = np.zeros(shape, np.float32)
    for x in frames:
        step = dict(zip(names, session.run(names, {"x": x, **feed}), strict=True))
        found.append(step["y"])
        feed = {name: step[name.replace("state_in", "state_out")] for name in feed}
    return found


CELLS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: ConvGRUCell(5, 32),
    "gru of blocks": lambda: ConvGRUCell(32, 16),
    "gru 1x5 hard": lambda: ConvGRUCell(3, 16, (1, 5), gates="hard"),
    "lstm": lambda: ConvLSTMCell(3, 16),
    "lstm peephole": lambda: ConvLSTMCell(18, 32, peephole="channel"),
    "lstm hard": lambda: ConvLSTMCell(1, 16, gates="hard"),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_split_cell_computes_the_same(name: str, tmp_path: Path) -> None:
    cell = CELLS[name]()
    path = export(tmp_path / "cell.onnx", cell)
    frames = frames_of(STEPS, 2, cell.input_size, 7, 10)
    model = simplified(path, *frames[0].shape)
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert split_convolutions(model) == convolutions
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2 * convolutions
    assert all(node.op_type != "Concat" for node in model.graph.node)
    plain = outputs(onnx.load(path), frames)
    expected, _ = run_sequence(stack_of(CELLS[name]()).double(), torch.from_numpy(frames).double())
    with StepLoop.open(path, threads=1) as loop:
        found = [loop.step(x=x)["y"] for x in frames]
    for step, by_hand in zip(found, outputs(model, frames), strict=True):
        np.testing.assert_array_equal(step, by_hand, err_msg="the loop does not run this form")
    assert any((a != b).any() for a, b in zip(found, plain, strict=True)), "the split has no effect"
    worst, its = (float(np.abs(np.stack(ys) - expected.detach().numpy()).max()) for ys in (found, plain))
    assert worst < 5e-6, f"{name}: {worst:.1e} after {STEPS} steps, the file as it is {its:.1e}"


def test_the_zoo_denoiser(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Denoiser().eval()
    path = tmp_path / "denoiser.onnx"
    export_small(module, path)
    frames = np.random.default_rng(0).random((100, 1, 3, 34, 38), np.float32)
    with torch.inference_mode():
        expected, _ = run_sequence(module.double(), torch.from_numpy(frames).double())
    assert split_convolutions(simplified(path, 1, 3, 34, 38)) == 3
    with StepLoop.open(path, threads=1) as loop:
        worst = max(float(np.abs(loop.step(x=x)["y"] - y).max()) for x, y in zip(frames, expected.numpy(), strict=True))
    assert worst < 5e-6, f"{worst:.1e}"


@pytest.mark.parametrize("inputs", [32, 5])
def test_slots_have_the_bits_of_loops_of_their_own(inputs: int, tmp_path: Path) -> None:
    path = export(tmp_path / "cell.onnx", ConvGRUCell(inputs, 32))
    frames = frames_of(30, 3, inputs, 18, 15)
    singles = [StepLoop.open(path, threads=threads) for threads in (1, 2, 1)]
    with StepLoop.open(path, slots=4, threads=2) as loop:
        slots = [loop.attach() for _ in singles]
        for number, x in enumerate(frames):
            rows = [row for row in range(3) if (number + row) % 4]  # one of them is idle now and then
            found = loop.step_slots({slots[row]: {"x": x[row : row + 1]} for row in rows})
            for row in rows:
                expected = singles[row].step(x=x[row : row + 1])["y"]
                np.testing.assert_array_equal(found[slots[row]]["y"], expected, err_msg=f"step {number}, row {row}")
    for single in singles:
        single.close()


def test_other_sizes_after_a_reset(tmp_path: Path) -> None:
    path = export(tmp_path / "cell.onnx", ConvGRUCell(32, 32))
    with StepLoop.open(path, threads=1) as loop:
        for shape in ((1, 32, 16, 17), (2, 32, 5, 4), (1, 32, 23, 16), (3, 32, 16, 17)):
            loop.reset()
            frames = frames_of(4, *shape)
            with StepLoop.open(path, threads=1) as other:
                for x in frames:
                    np.testing.assert_array_equal(loop.step(x=x)["y"], other.step(x=x)["y"], err_msg=str(shape))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_file_is_left(precision: str, tmp_path: Path) -> None:
    path = export(tmp_path / "cell.onnx", ConvGRUCell(5, 32), precision=precision)
    before = path.read_bytes()
    frames = frames_of(8, 1, 5, 16, 16)
    plain = outputs(to_float32(onnx.load(path)), frames)
    with StepLoop.open(path, threads=1) as loop:
        found = [loop.step(x=x)["y"] for x in frames]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(found, plain, strict=True))
    assert 0 < worst < 5e-6, f"{worst:.1e}"
    assert path.read_bytes() == before


def model_of(
    x: int = 5, h: int = 32, outputs: int = 32, kernel: int = 3, axis: int = 1, size: int | str = 8, group: int = 1
) -> onnx.ModelProto:
    """One convolution of two maps."""
    channels = x if axis != 1 else x + h
    weights = numpy_helper.from_array(np.ones((outputs, channels // group, kernel, kernel), np.float32), "w")
    nodes = [
        helper.make_node("Concat", ["x", "h"], ["xh"], axis=axis),
        helper.make_node("Conv", ["xh", "w"], ["y"], pads=[kernel // 2] * 4, group=group),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, count, size, 8))
        for name, count in (("x", x), ("h", h))
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "one", inputs, [output], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    "sizes",
    [
        {"h": 20},
        {"h": 8},
        {"kernel": 1},
        {"outputs": 20},
        {"size": "height"},
        {"x": 32, "axis": 2},
        {"x": 32, "group": 2},
    ],
)
def test_a_convolution_with_nothing_to_gain_is_left(sizes: dict[str, Any]) -> None:
    assert split_convolutions(model_of()) == 1
    model = model_of(**sizes)
    before = model.SerializeToString()
    assert split_convolutions(model) == 0
    assert model.SerializeToString() == before


def test_a_map_that_something_else_reads_is_still_concatenated() -> None:
    model = model_of()
    model.graph.node.add().CopyFrom(helper.make_node("Relu", ["xh"], ["z"]))
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * 4))
    assert split_convolutions(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Concat", "Conv", "Conv", "Add", "Relu"]


def test_what_a_branch_reads_is_left() -> None:
    model = model_of()
    result = helper.make_tensor_value_info("b", TensorProto.FLOAT, [None] * 4)
    branches = [
        helper.make_graph([helper.make_node(op, ["xh"], ["b"])], op, [], [result]) for op in ("Identity", "Neg")
    ]
    model.graph.initializer.append(helper.make_tensor("condition", TensorProto.BOOL, (), [1]))
    node = helper.make_node("If", ["condition"], ["z"], then_branch=branches[0], else_branch=branches[1])
    model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * 4))
    before = model.SerializeToString()
    assert split_convolutions(model) == 0
    assert model.SerializeToString() == before


def test_without_a_folder_for_temporary_files_the_model_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    path = export(tmp_path / "cell.onnx", ConvGRUCell(32, 32))
    frames = frames_of(4, 1, 32, 16, 16)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with StepLoop.open(path, threads=1) as loop:
        for x, expected in zip(frames, outputs(onnx.load(path), frames), strict=True):
            np.testing.assert_array_equal(loop.step(x=x)["y"], expected)
    assert "is not specialised for its sizes, which is slower: No such file or directory" in logged.text


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = export(tmp_path / "whole.onnx", ConvGRUCell(32, 32))
    beside = tmp_path / "beside.onnx"
    onnx.save(onnx.load(path), beside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    frames = frames_of(4, 1, 32, 16, 16)
    with StepLoop.open(path, threads=1) as loop, StepLoop.open(beside, threads=1) as other:
        for x in frames:
            np.testing.assert_array_equal(loop.step(x=x)["y"], other.step(x=x)["y"])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"beside\.onnx: weights .* in 'weights\.bin' beside it, which cannot be read"):
        StepLoop.open(beside)


def test_weights_too_large_for_one_file_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(tmp_path / "cell.onnx", ConvGRUCell(32, 32))
    monkeypatch.setattr("stepcell.runtime.backends.onnxruntime.session._LARGE_MODEL", 1000)
    frames = frames_of(4, 1, 32, 16, 16)
    with StepLoop.open(path, threads=1) as loop:
        for x, expected in zip(frames, outputs(onnx.load(path), frames), strict=True):
            np.testing.assert_array_equal(loop.step(x=x)["y"], expected)
