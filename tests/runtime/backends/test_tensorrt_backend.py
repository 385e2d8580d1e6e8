"""TensorRT back end without a GPU: its errors, and the names it uses against the real bindings."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from stepcell.errors import DeviceError, EngineMismatchError
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.tensorrt import backend as tensorrt
from stepcell.runtime.backends.tensorrt import runtime_cache
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.engine import engine_check, plan
from stepcell.runtime.engine import onnx_input as graph
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.sidecar import sidecar_path


@pytest.fixture
def engine(denoiser_onnx_fixed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    build_engine(denoiser_onnx_fixed, path)
    return path


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find no GPU, also on a machine that has one."""
    problem = "CUDA: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((), None, problem))


def test_without_a_gpu_the_refusal_says_what_was_found(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(DeviceError) as caught:
        TensorRTBackend(engine, Device("cuda", 0))
    assert caught.value.exit_code == 6
    assert "cuda:0 was asked for, this machine has no GPU (CUDA: CUDA_ERROR_NO_DEVICE" in caught.value.message
    assert "--device cpu" in str(caught.value.hint)


def test_a_gpu_number_that_is_not_there(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = cuda.Gpu(0, "Only GPU", "8.9", 1 << 30)
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((gpu,), "13.0", ""))
    with pytest.raises(DeviceError, match="cuda:3 was asked for, this machine has cuda:0 Only GPU"):
        TensorRTBackend(engine, Device("cuda", 3))


def test_the_engine_is_checked_before_the_device(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    sidecar_path(engine).write_text(sidecar_path(engine).read_text().replace('"8.6"', '"8.7"'))
    with pytest.raises(EngineMismatchError):
        TensorRTBackend(engine, Device("cuda", 0))


def _accesses(module: Any) -> set[tuple[str, str]]:
    """Every `name.attribute` in a module's source; `self._name.attribute` counts as `_name`."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            found.add((owner, node.attr))
    return found


@pytest.mark.parametrize(
    ("module", "owners"),
    [
        (
            plan,
            {
                "trt": tensorrt_rtx,
                "builder": tensorrt_rtx.Builder,
                "network": tensorrt_rtx.INetworkDefinition,
                "parser": tensorrt_rtx.OnnxParser,
                "error": tensorrt_rtx.ParserError,
                "config": tensorrt_rtx.IBuilderConfig,
                "profile": tensorrt_rtx.IOptimizationProfile,
                "layer": tensorrt_rtx.ILayer,
                "tensor": tensorrt_rtx.ITensor,
                "TensorFormat": tensorrt_rtx.TensorFormat,
                "BuilderFlag": tensorrt_rtx.BuilderFlag,
                "MemoryPoolType": tensorrt_rtx.MemoryPoolType,
            },
        ),
        (graph, {"network": tensorrt_rtx.INetworkDefinition, "tensor": tensorrt_rtx.ITensor}),
        (
            engine_check,
            {"trt": tensorrt_rtx, "runtime": tensorrt_rtx.Runtime, "EngineValidity": tensorrt_rtx.EngineValidity},
        ),
        (
            tensorrt,
            {
                "trt": tensorrt_rtx,
                "_trt": tensorrt_rtx,
                "_runtime": tensorrt_rtx.Runtime,
                "_engine": tensorrt_rtx.ICudaEngine,
                "engine": tensorrt_rtx.ICudaEngine,
                "_context": tensorrt_rtx.IExecutionContext,
                "TensorIOMode": tensorrt_rtx.TensorIOMode,
                "TensorFormat": tensorrt_rtx.TensorFormat,
                "config": tensorrt_rtx.IRuntimeConfig,
                "DynamicShapesKernelSpecializationStrategy": tensorrt_rtx.DynamicShapesKernelSpecializationStrategy,
            },
        ),
        (runtime_cache, {"config": tensorrt_rtx.IRuntimeConfig, "cache": tensorrt_rtx.IRuntimeCache}),
    ],
    ids=["plan", "graph", "check", "tensorrt", "runtime_cache"],
)
def test_every_tensorrt_name_that_is_used_exists(module: Any, owners: dict[str, Any]) -> None:
    accesses = _accesses(module)
    for owner, real in owners.items():
        names = {attribute for name, attribute in accesses if name == owner}
        # an ONNX node has these; the variable `tensor` of graph.py is an initializer in one place
        names -= {"name", "data_location"} if owner == "tensor" else set()
        assert names, f"{owner} is no longer used: remove it from the table"
        missing = {name for name in names if not hasattr(real, name)}
        assert not missing, f"{real}: no {missing}"
