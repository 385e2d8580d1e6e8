"""Fake engine: a TensorRT engine that runs in ONNX Runtime, on the memory of a fake CUDA driver.

The engine reads and writes the addresses it was given, when the stream it was queued on is waited for. What this
cannot show is TensorRT's own arithmetic.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import tensorrt_rtx
from cuda.bindings.driver import CUresult
from numpy.typing import NDArray

from stepcell.contract import STATE_IN, STATE_OUT, StepContract
from stepcell.dims import resolve
from stepcell.onnx_model import read_onnx
from stepcell.plugins.fp16_mirrors import Fp16Mirror, engine_tensors, half_map, half_shape
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.tensorrt import backend as tensorrt
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.engine_check import CheckedEngine, check_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.sidecar import read_sidecar, sidecar_path
from stepcell.runtime.engine.tensorrt_module import TensorRT
from tests.fakes.counting_driver import CountingDriver
from tools.fake_driver import FakeDriver

SMALLEST = {"batch": 1, "height": 16, "width": 16}  # sizes for which engines are built
LARGEST = {"batch": 3, "height": 32, "width": 32}
_DTYPES = {"float16": "HALF", "float32": "FLOAT", "int32": "INT32", "uint8": "UINT8"}
LAUNCH_FAILED = CUresult.CUDA_ERROR_LAUNCH_FAILED
INVALIDATED = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED


class FakeRuntimeConfig:
    """Runtime configuration and runtime cache of TensorRT-RTX in one; the cache is a few bytes.

    Attributes:
        compiled: kernels in the cache.
        found: kernels that were read from a file.
        dynamic_shapes_kernel_specialization_strategy: as in the bindings.
    """

    def __init__(self) -> None:
        self.compiled = self.found = b""
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.used = False

    def create_runtime_cache(self) -> FakeRuntimeConfig:
        return self

    def set_runtime_cache(self, cache: FakeRuntimeConfig) -> bool:
        self.used = cache is self
        return True

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(b"kernels"):
            return False
        self.compiled = self.found = data
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.compiled)

    def reset(self) -> bool:
        self.compiled = b""
        return True


class FakeEngine:
    """An engine and its only execution context: the ONNX model, run on addresses.

    Values of a state that differ from the fp16 mirror that the engine was given become NaN and are counted as stale.
    """

    def __init__(
        self, gpu: FakeDriver, onnx: Path, contract: StepContract, mirrors: tuple[Fp16Mirror, ...] = ()
    ) -> None:
        self.gpu = gpu
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.contract = contract
        self.inputs, self.outputs = engine_tensors(contract, mirrors)
        self.mirrors = mirrors
        self.formats = {name: "HWC8" for mirror in mirrors for name in (mirror.input, mirror.output)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs: list[dict[str, int]] = []
        self.stale = 0  # number of values of fp16 mirrors that differ from their state
        self.refuse = False
        self.capturable = True
        self.config = FakeRuntimeConfig()

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return getattr(tensorrt_rtx.TensorIOMode, "INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = {**self.inputs, **self.outputs}[name].dtype
        return SimpleNamespace(name=_DTYPES[dtype])

    def get_tensor_format(self, name: str) -> Any:
        return getattr(tensorrt_rtx.TensorFormat, self.formats.get(name, "LINEAR"))

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return self.config

    def create_execution_context(self, config: FakeRuntimeConfig | None = None) -> FakeEngine:
        return self

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in self.inputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        source = name.replace("state_out.", "state_in.").replace("half_out.", "half_in.")
        if source in self.shapes:
            return self.shapes[source]
        sizes = self.contract.bind({spec.name: self.shapes[spec.name] for spec in self.contract.inputs})
        return resolve(self.outputs[name].shape, sizes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.gpu.allocations, "an address that is not allocated"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuse:
            return False
        if self.config.used and not self.config.compiled:
            self.config.compiled = b"kernels for this GPU"
        addresses = dict(self.addresses)
        assert len(set(addresses.values())) == self.num_io_tensors, "two tensors at the same address"
        self.gpu.queue(stream, lambda: self._run(addresses))
        return True

    def _run(self, addresses: dict[str, int]) -> None:
        self.runs.append(addresses)
        feeds = {name: self._at(addresses[name], name, spec.dtype).copy() for name, spec in self.inputs.items()}
        for mirror in self.mirrors:
            state, half = feeds[STATE_IN + mirror.state], feeds.pop(mirror.input)[..., : self.channels(mirror)]
            wanted = half_map(state)[..., : self.channels(mirror)]
            stale = (half != wanted) & ~(np.isnan(half) & np.isnan(wanted))
            state[stale.transpose(0, 3, 1, 2)] = np.nan
            self.stale += int(stale.sum())
        names = [name for name in self.outputs if name not in self.formats]
        results = dict(zip(names, self.session.run(names, feeds), strict=True))
        results |= {mirror.output: half_map(results[STATE_OUT + mirror.state]) for mirror in self.mirrors}
        for name, spec in self.outputs.items():
            self._at(addresses[name], name, spec.dtype)[:] = results[name]

    def channels(self, mirror: Fp16Mirror) -> int:
        return self.get_tensor_shape(mirror.input)[1]

    def _at(self, address: int, name: str, dtype: str) -> NDArray[Any]:
        shape = self.get_tensor_shape(name)
        shape = half_shape(shape) if name in self.formats else shape
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block: Any = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(block, dtype).reshape(shape)


class Machine:
    """A machine with a fake GPU and an engine of a model.

    Args:
        fp16_mirrors: the engine takes the fp16 mirrors of all states, as one with the plugin does.

    Attributes:
        gpu: the fake driver.
        counted: the same with its calls counted.
    """

    def __init__(
        self, onnx: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, fp16_mirrors: bool = False
    ) -> None:
        self.path = folder / "model.engine"
        built = onnx.with_suffix(".fake.engine")  # built once per model
        if not built.exists():
            (x,) = read_onnx(onnx).contract.inputs
            least, most = ({"x": resolve(x.shape, dict(SMALLEST, **sizes))} for sizes in ({}, LARGEST))
            build_engine(onnx, built, BuildOptions(min_shapes=least, max_shapes=most))
        shutil.copy(built, self.path)
        shutil.copy(sidecar_path(built), sidecar_path(self.path))
        if fp16_mirrors:
            sidecar = read_sidecar(built)
            names = [state.name for state in sidecar.contract.states]
            mirrors = tuple(Fp16Mirror(name, f"half_in.{name}", f"half_out.{name}") for name in names)
            sidecar_path(self.path).write_text(msgspec.structs.replace(sidecar, fp16_mirrors=mirrors).to_json())
        checked = check_engine(self.path)
        self.onnx, self.contract = onnx, checked.sidecar.contract
        self.gpu = FakeDriver()
        self.counted = CountingDriver(self.gpu)
        self.engine = FakeEngine(self.gpu, onnx, self.contract, checked.sidecar.fp16_mirrors)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine if plan == checked.plan else None)
        module = SimpleNamespace(
            __version__=checked.tensorrt.version,
            ILogger=tensorrt_rtx.ILogger,
            TensorIOMode=tensorrt_rtx.TensorIOMode,
            TensorFormat=tensorrt_rtx.TensorFormat,
            DynamicShapesKernelSpecializationStrategy=tensorrt_rtx.DynamicShapesKernelSpecializationStrategy,
            Runtime=lambda _: runtime,
        )
        found = CheckedEngine(checked.plan, checked.sidecar, TensorRT("tensorrt-rtx", module))
        discovery = cuda.Discovery((cuda.Gpu(0, "Fake GPU", "8.9", 1 << 30),), "13.0", "")
        monkeypatch.setattr(tensorrt, "check_engine", lambda *_, **__: found)
        monkeypatch.setattr(cuda, "discover", lambda: discovery)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", self.counted)

    def open(self) -> TensorRTBackend:
        return TensorRTBackend(self.path, Device("cuda", 0))

    def refuse(self, *, yes: bool) -> None:
        """Make every step fail when it is queued."""
        self.engine.refuse = yes
        self.gpu.failures = {"cuGraphLaunch": LAUNCH_FAILED} if yes else {}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of a stack, in which all maps have the size of the frames."""
        channels = {**self.engine.inputs, **self.engine.outputs}[name].shape[1]
        assert isinstance(channels, int)
        return (2, channels, 16, 24)


SYMBOLS = {"batch": 2, "height": 16, "width": 24}


def frames(count: int, batch: int = 2, height: int = 16, width: int = 24) -> list[NDArray[Any]]:
    """Frames with the sizes above."""
    generator = np.random.default_rng(0)
    return [generator.random((batch, 3, height, width)).astype(np.float16) for _ in range(count)]


def reference(onnx: Path, contract: StepContract, clip: list[NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    """All graph outputs of every step, by plain ONNX Runtime."""
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    symbols = contract.bind({"x": clip[0].shape})
    shapes = contract.state_shapes(symbols)
    states = {state.input: np.zeros(shapes[state.name], state.dtype) for state in contract.states}
    names, results = list(contract.graph_outputs), []
    for frame in clip:
        outputs = dict(zip(names, session.run(names, {"x": frame, **states}), strict=True))
        states = {state.input: outputs[state.output] for state in contract.states}
        results.append(outputs)
    return results
