"""The TensorRT back end where there is no GPU: its refusals, and its names against the real bindings."""

# ruff: noqa: N802, N815  # CUDA's names

from __future__ import annotations

import ast
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from stepcell.errors import DeviceError, EngineMismatchError, MissingDependencyError
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.tensorrt import backend as tensorrt
from stepcell.runtime.backends.tensorrt import runtime_cache
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.cuda import driver as cuda
from stepcell.runtime.engine import check, plan
from stepcell.runtime.engine import onnx_input as graph
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.sidecar import sidecar_path


@pytest.fixture
def engine(denoiser_onnx_fixed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    build_engine(denoiser_onnx_fixed, path, say=lambda _: None)
    return path


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer on a machine that has one."""
    problem = "CUDA: cudaErrorNoDevice: no CUDA-capable device is detected"
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((), None, problem))


def test_without_a_gpu_the_refusal_says_what_was_found(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(DeviceError) as caught:
        TensorRTBackend(engine, Device("cuda", 0))
    assert caught.value.exit_code == 6
    assert "cuda:0 was asked for, this machine has no GPU (CUDA: cudaErrorNoDevice" in caught.value.message
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
        (check, {"trt": tensorrt_rtx, "runtime": tensorrt_rtx.Runtime, "EngineValidity": tensorrt_rtx.EngineValidity}),
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
        assert names, f"{owner} is not used any more: take it out of the table"
        missing = {name for name in names if not hasattr(real, name)}
        assert not missing, f"{real}: no {missing}"


def test_every_cuda_name_that_is_used_exists() -> None:
    from cuda.bindings import runtime

    names = {attribute for owner, attribute in _accesses(cuda) if owner == "runtime"}
    assert len(names) > 8
    assert not {name for name in names if not hasattr(runtime, name)}
    for field in ("name", "major", "minor", "totalGlobalMem"):
        assert hasattr(runtime.cudaDeviceProp, field)


def test_discovery_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda.discover()
    assert bool(found.devices) != bool(found.problem)

    def missing() -> None:
        raise MissingDependencyError("running on a GPU needs the package 'cuda'", hint="pip install 'stepcell[cuda]'")

    monkeypatch.setattr(cuda, "_runtime", missing)
    assert cuda.discover().problem
    for count, problem in (
        (0, "no NVIDIA driver is installed, or it sees no GPU"),
        (2, "the driver sees 2 of them, but running on a GPU needs the package 'cuda' (pip install 'stepcell[cuda]')"),
    ):
        monkeypatch.setattr(cuda, "device_count", lambda count=count: count)
        assert cuda.discover() == cuda.Discovery((), None, problem)


def test_every_cuda_status_becomes_an_error_with_its_name() -> None:
    from cuda.bindings import runtime

    for status in runtime.cudaError_t:
        if status == runtime.cudaError_t.cudaSuccess:
            assert cuda.check((status, 5)) == 5
            assert cuda.check((status,)) is None
            continue
        with pytest.raises(DeviceError, match=rf"CUDA: {status.name}: \w+") as caught:
            cuda.check((status, None))
        assert caught.value.exit_code == 6
    assert set(cuda._HINTS) <= {status.name for status in runtime.cudaError_t}


def test_cuda_calls_take_their_arguments() -> None:
    """Each call reaches the real CUDA runtime: without a driver it fails there, and not on an argument."""
    from cuda.bindings import runtime

    if cuda.discover().devices:
        pytest.skip("needs a machine without a GPU: the addresses used here are not real")
    stream = object.__new__(cuda.Stream)
    stream.handle = 0
    buffer = object.__new__(cuda.DeviceBuffer)
    buffer.nbytes, buffer.address = 8, 4096
    event = object.__new__(cuda.Event)
    event.handle = 0
    array = np.zeros(2, np.float32)
    rows = cuda.Rows.of(buffer.address, array.shape, 0, 4)
    for call in (
        lambda: cuda.use_device(0),
        cuda.Stream,
        cuda.Event,
        lambda: cuda.DeviceBuffer(8),
        lambda: cuda.PinnedArray((2,), np.float32),
        stream.synchronize,
        lambda: stream.wait(event),
        lambda: cuda.wait_on(cuda.DEFAULT_STREAM, event),
        lambda: event.record(stream),
        lambda: event.record_on(cuda.DEFAULT_STREAM),
        event.synchronize,
        lambda: cuda.Graph.capture(stream, lambda: None),
        lambda: cuda.Graph(runtime.cudaGraphExec_t()).launch(stream),
        lambda: cuda.device_of(buffer.address),
        lambda: cuda.copy_on_device(buffer.address, buffer.address, 8, stream),
        lambda: event.milliseconds_since(event),
        lambda: buffer.clear(stream),
        lambda: cuda.clear_row(rows, 0, stream),
        lambda: cuda.copy_row(rows, 0, rows, 1, stream),
        lambda: cuda.copy_to_device(buffer, array, stream),
        lambda: cuda.copy_to_host(array, buffer, stream),
    ):
        with pytest.raises(DeviceError, match="CUDA: cudaError"):
            call()


class PretendedMemory:
    """Both calls that work on rows, on host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToDevice=3)

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Any]:
        for row in range(height):
            ctypes.memset(address + row * pitch, value, width)
        return (SimpleNamespace(value=0),)

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[Any]:
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * pitch, width)
        return (SimpleNamespace(value=0),)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_any_axis_are_cleared_and_copied(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    monkeypatch.setattr(cuda, "_runtime", PretendedMemory)
    stream = object.__new__(cuda.Stream)
    stream.handle = 0
    array = np.ones((2, 3, 4), np.float32)
    expected = array.copy()
    rows = cuda.Rows.of(array.ctypes.data, array.shape, axis, 4)
    index: tuple[Any, ...] = (slice(None),) * axis
    cuda.clear_row(rows, 1, stream)
    expected[(*index, 1)] = 0
    np.testing.assert_array_equal(array, expected)
    other = np.random.default_rng(0).random([5 if a == axis else n for a, n in enumerate(array.shape)], np.float32)
    cuda.copy_row(rows, 0, cuda.Rows.of(other.ctypes.data, other.shape, axis, 4), 4, stream)
    expected[(*index, 0)] = other[(*index, 4)]
    np.testing.assert_array_equal(array, expected)
