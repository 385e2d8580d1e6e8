"""Models and clips that several tests share.

Without torch, tests that need it are skipped: `make test-pythons` runs the others on every Python.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper

from stepcell.contract import METADATA_KEY, Spec, StateSpec, StepContract, TensorSpec
from stepcell.models.zoo.clips import HELD_OUT, read_clip
from stepcell.models.zoo.clips import clip_path as find_clip
from tests import exported_models
from tests.fakes.network_camera import Camera

if TYPE_CHECKING:
    from stepcell.models import CellStack
    from stepcell.models.zoo.denoiser import Denoiser

# Tests compare results bit by bit, and what is faster here is another back end on another machine.
os.environ.setdefault("STEPCELL_BACKEND", "onnxruntime")
WITHOUT_TORCH = importlib.util.find_spec("torch") is None
collect_ignore = ["exporter", "golden", "gpu", "models", "plugins"] if WITHOUT_TORCH else []


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, Any]:
    """A test file that imports torch is skipped where torch is not installed, instead of an error."""
    report = yield
    if WITHOUT_TORCH and report.failed and "No module named 'torch'" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs torch")
    return report


# The files that take longest, first of all: begun last, one worker would be at them alone while the others have ended.
LONGEST = (
    "golden/test_golden.py",
    "plugins/kernels/test_ptx.py",
    "exporter/from_onnx/test_fuse.py",
    "test_docs.py",
    "cli/test_unfriendly.py",
    "plugins/kernels/test_compile.py",
    "exporter/from_module/test_cells.py",
    "exporter/step_onnx/test_export.py",
    "test_install.py",
    "exporter/from_module/test_lift.py",
    "plugins/kernels/test_arithmetic.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    if "torch" in sys.modules:
        _share_operators()


def _share_operators() -> None:
    """One table of torch's operators for all exports, which do not change it: making it is half of a small export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def denoiser() -> Denoiser:
    """A small denoiser with random weights: state h (batch, 8, height // 2, width // 2)."""
    pytest.importorskip("torch")
    return exported_models.denoiser()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of exported models, each exported once per test run, or before it: see tests/exported_models.py."""
    if "STEPCELL_TEST_MODELS" in os.environ:
        return Path(os.environ["STEPCELL_TEST_MODELS"])
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of a worker lies in the one of the run
        folder = tmp_path_factory.getbasetemp().parent / "exported"
        folder.mkdir(exist_ok=True)
        return folder
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def denoiser_onnx(exported: Path) -> Path:
    """float16 compute, float32 state, dynamic batch, height and width."""
    return exported_models.exported_model("denoiser", exported)


@pytest.fixture(scope="session")
def denoiser_onnx_float32(exported: Path) -> Path:
    """float32, dynamic batch, height and width."""
    return exported_models.exported_model("denoiser32", exported)


@pytest.fixture(scope="session")
def denoiser_onnx_fixed(exported: Path) -> Path:
    """float16, fixed at 1x3x64x96."""
    return exported_models.exported_model("denoiser_fixed", exported)


@pytest.fixture(scope="session")
def stack_onnx(exported: Path) -> Path:
    """A ConvGRU below a ConvLSTM, float16: states h0, h1, c1; x (batch, 3, height, width)."""
    return exported_models.exported_model("stack", exported)


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
        image.setdefault("range", (0.0, 255.0) if dtype != "bool" else None)
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
    pytest.importorskip("torch")
    return exported_models.learned()


@pytest.fixture(scope="session")
def learned_onnx(exported: Path) -> Path:
    """The same as a float32 file."""
    return exported_models.exported_model("learned", exported)


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
