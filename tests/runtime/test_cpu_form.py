"""Cells whose convolutions are computed apart on a CPU: which, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import InputError
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.runtime import StepLoop
from stepcell.runtime.cpu_form import convolve_apart
from stepcell.runtime.float32 import to_float32

STEPS = 64


def export(path: Path, *cells: nn.Module, precision: str = "float32") -> Path:
    torch.manual_seed(0)
    for cell in cells:
        for parameter in cell.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
    export_onnx(CellStack(list(cells)), path, precision=precision)
    return path


def outputs(model: onnx.ModelProto, frames: NDArray[np.float32]) -> list[dict[str, NDArray[Any]]]:
    """Every output of every step, each state fed back by a loop written by hand."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    text = next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY)
    contract = StepContract.from_json(text)
    shapes = contract.state_shapes(contract.bind({"x": frames[0].shape}))
    feed = {state.input: np.zeros(shapes[state.name], np.float32) for state in contract.states}
    names = [output.name for output in session.get_outputs()]
    found = []
    for x in frames:
        found.append(dict(zip(names, session.run(names, {"x": x, **feed}), strict=True)))
        feed = {state.input: found[-1][state.output] for state in contract.states}
    return found


def frames_of(channels: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((STEPS, 2, channels, 7, 10)).astype(np.float32)


CELLS = {
    "gru": lambda: ConvGRUCell(5, 32),
    "gru 1x5 hard": lambda: ConvGRUCell(3, 16, (1, 5), gates="hard"),
    "lstm": lambda: ConvLSTMCell(3, 16),
    "lstm peephole": lambda: ConvLSTMCell(18, 32, peephole="channel"),
    "lstm hard": lambda: ConvLSTMCell(1, 16, gates="hard"),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_apart_computes_the_same(name: str, tmp_path: Path) -> None:
    model = onnx.load(export(tmp_path / "cell.onnx", CELLS[name]()))
    frames = frames_of(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)
    together = outputs(model, frames)
    assert convolve_apart(model)
    onnx.checker.check_model(model, full_check=True)
    worst = max(
        float(np.abs(a[key] - b[key]).max()) for a, b in zip(together, outputs(model, frames), strict=True) for key in a
    )
    assert 0 < worst < 5e-6, f"{name}: {worst:.1e} after {STEPS} steps"


def test_only_cells_that_gain_are_changed(tmp_path: Path) -> None:
    cells = ConvGRUCell(5, 32), ConvGRUCell(32, 18), ConvGRUCell(18, 20), ConvLSTMCell(20, 18), ConvLSTMCell(18, 16)
    model = onnx.load(export(tmp_path / "stack.onnx", *cells))
    assert convolve_apart(model)
    found = [node.op_type for node in model.graph.node if node.domain == "stepcell"]
    assert found == ["ConvGRUApart", "ConvGRU", "ConvGRU", "ConvLSTM", "ConvLSTMApart"]
    again = model.SerializeToString()
    assert not convolve_apart(model), "what is apart is left"
    assert model.SerializeToString() == again


@pytest.mark.parametrize(
    "cell",
    [
        lambda: ConvGRUCell(32, 32),
        lambda: ConvLSTMCell(12, 20),
        lambda: ConvGRUCell(5, 12),
        lambda: ConvGRUCell(5, 32, 1),
        lambda: ConvGRUCell(5, 32, reset="after"),
    ],
)
def test_a_model_with_nothing_to_gain_is_left(cell: Any, tmp_path: Path) -> None:
    model = onnx.load(export(tmp_path / "cell.onnx", cell()))
    before = model.SerializeToString()
    assert not convolve_apart(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_loop_runs_this_form_and_leaves_the_file(precision: str, tmp_path: Path) -> None:
    path = export(tmp_path / "cell.onnx", ConvGRUCell(5, 32), precision=precision)
    before = path.read_bytes()
    model = to_float32(onnx.load(path))
    frames = frames_of(5)
    together = outputs(model, frames)[-1]
    assert convolve_apart(model)
    with StepLoop.open(path, threads=1) as loop:
        for x, expected in zip(frames, outputs(model, frames), strict=True):
            np.testing.assert_array_equal(loop.step(x=x)["y"], expected["y"])
    assert np.abs(together["y"] - expected["y"]).max() > 0, "the forms cannot be told apart"
    assert path.read_bytes() == before


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = export(tmp_path / "whole.onnx", ConvGRUCell(5, 32))
    beside = tmp_path / "beside.onnx"
    onnx.save(onnx.load(path), beside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    frames = frames_of(5)[:4]
    with StepLoop.open(path, threads=1) as loop, StepLoop.open(beside, threads=1) as other:
        for x in frames:
            np.testing.assert_array_equal(loop.step(x=x)["y"], other.step(x=x)["y"])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"beside\.onnx: its weights are in another file, which cannot be read"):
        StepLoop.open(beside)
