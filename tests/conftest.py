"""Models and clips that several tests share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from stepcell.contract import METADATA_KEY, Spec, StateSpec, StepContract, TensorSpec
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.models.zoo.clips import HELD_OUT, read_clip
from stepcell.models.zoo.clips import clip_path as find_clip
from stepcell.models.zoo.denoiser import Denoiser
from tests.fakes.network_camera import Camera


@pytest.fixture(scope="session")
def denoiser() -> Denoiser:
    """A small denoiser with random weights: state h (batch, 8, height // 2, width // 2)."""
    torch.manual_seed(0)
    return Denoiser(hidden=8).eval()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of exported models, each exported once per test run."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def denoiser_onnx(exported: Path, denoiser: Denoiser) -> Path:
    """float16 compute, float32 state, dynamic batch, height and width."""
    path = exported / "denoiser.onnx"
    export_onnx(denoiser, path, family="denoiser")
    return path


@pytest.fixture(scope="session")
def denoiser_onnx_float32(exported: Path, denoiser: Denoiser) -> Path:
    """float32, dynamic batch, height and width."""
    path = exported / "denoiser32.onnx"
    export_onnx(denoiser, path, precision="float32", family="denoiser")
    return path


@pytest.fixture(scope="session")
def denoiser_onnx_fixed(exported: Path, denoiser: Denoiser) -> Path:
    """float16, fixed at 1x3x64x96."""
    path = exported / "denoiser_fixed.onnx"
    export_onnx(denoiser, path, shapes={"x": (1, 3, 64, 96)}, family="denoiser")
    return path


@pytest.fixture(scope="session")
def stack_onnx(exported: Path) -> Path:
    """A ConvGRU below a ConvLSTM, float16: states h0, h1, c1; x (batch, 3, height, width)."""
    torch.manual_seed(0)
    path = exported / "stack.onnx"
    export_onnx(CellStack([ConvGRUCell(3, 6), ConvLSTMCell(6, 4, (1, 5))]), path, family="stack")
    return path


@pytest.fixture(scope="session")
def clip_path() -> Path:
    """A real clip, 176x144, 120 frames, that no model was trained on."""
    return find_clip(HELD_OUT)


def _write_model(path: Path, contract: StepContract, nodes: list[onnx.NodeProto], **graph: Any) -> Path:
    """An ONNX file whose graph has the inputs and outputs of the contract, and the contract in it."""

    def infos(specs: dict[str, Spec]) -> list[onnx.ValueInfoProto]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)) for name, spec in specs.items()}
        return [helper.make_tensor_value_info(name, kinds[name], spec.shape) for name, spec in specs.items()]

    body = helper.make_graph(nodes, "test", infos(contract.graph_inputs), infos(contract.graph_outputs), **graph)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract.to_json()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def write_model() -> Callable[..., Path]:
    """`write_model(path, contract, nodes, **graph)` makes a model of one's own."""
    return _write_model


@pytest.fixture
def accumulator(tmp_path: Path) -> Callable[..., Path]:
    """Makes models of y = h' = h + x; keywords change the specs of x, y and h."""

    def make(
        name: str = "sum.onnx",
        *,
        shape: tuple[int | str, ...] = ("batch", 3, "height", "width"),
        dtype: Any = "float32",
        layout: str | None = "NCHW",
        **image: Any,
    ) -> Path:
        contract = StepContract(
            inputs=(TensorSpec(name="x", shape=shape, dtype=dtype, layout=layout, **image),),
            outputs=(TensorSpec(name="y", shape=shape, dtype=dtype, layout=layout, **image),),
            states=(StateSpec(name="h", shape=shape, dtype=dtype),),
            precision="float16" if dtype == "float16" else "float32",
        )
        nodes = [
            helper.make_node("Add", ["state_in.h", "x"], ["y"]),
            helper.make_node("Identity", ["y"], ["state_out.h"]),
        ]
        return _write_model(tmp_path / name, contract, nodes)

    return make


@pytest.fixture(scope="session")
def learned() -> CellStack:
    """A ConvGRU below a ConvLSTM whose states do not start at zero: h0 per channel, c1 one value for all."""
    torch.manual_seed(0)
    stack = CellStack([ConvGRUCell(3, 6), ConvLSTMCell(6, 4)])
    stack.initial = {"h0": torch.linspace(-0.5, 0.5, 6).reshape(6, 1, 1), "c1": torch.full((1, 1, 1), 0.7)}
    return stack


@pytest.fixture(scope="session")
def learned_onnx(exported: Path, learned: CellStack) -> Path:
    """The same as a float32 file."""
    path = exported / "learned.onnx"
    export_onnx(learned, path, precision="float32")
    return path


@pytest.fixture
def camera() -> Iterator[Camera]:
    """60 frames of 176x144."""
    camera = Camera(read_clip("carphone_pristine")[:60])
    yield camera
    camera.switch_off()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the library logs, also what is below a warning."""
    caplog.set_level(logging.INFO, logger="stepcell")
    return caplog
