"""A GPU, a CUDA runtime and an engine played by the host, for tests of the TensorRT back end.

"Device" memory is host memory. Streams are queues: queued work runs when it is waited for and no
earlier, and of other streams only what an event orders before it, so that whoever forgets to wait
reads what is not there yet. The engine is ONNX Runtime reading and writing the addresses it was
given. What this cannot show is TensorRT's own arithmetic and how long anything takes.
"""

# ruff: noqa: N802, N815  # CUDA's names

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import tensorrt_rtx
from numpy.typing import NDArray

from stepcell.contract import STATE_IN, STATE_OUT, StepContract
from stepcell.plugins.fp16_mirrors import Fp16Mirror, engine_tensors, half_map, half_shape
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.tensorrt import backend as tensorrt
from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
from stepcell.runtime.cuda import driver as cuda
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.check import CheckedEngine, check_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.sidecar import read_sidecar, sidecar_path
from stepcell.runtime.engine.tensorrt_module import TensorRT
from tests.stand_ins.counting import CountingCuda

OK = SimpleNamespace(value=0)
OUT_OF_MEMORY = SimpleNamespace(value=2, name="cudaErrorMemoryAllocation", text="out of memory")
FAILED = SimpleNamespace(value=719, name="cudaErrorLaunchFailure", text="unspecified launch failure")
INVALIDATED = SimpleNamespace(
    value=901, name="cudaErrorStreamCaptureInvalidated", text="operation failed due to a previous error during capture"
)
Work = Callable[[], Any]


class PretendedCuda:
    """The calls of the CUDA runtime that `stepcell.runtime.cuda.driver` makes.

    Attributes:
        memory: blocks by address.
        limit: bytes above which an allocation fails.
        invalidate: whether a capture fails at its end.
        refuse: name of a call that fails.
        fail_events: whether waiting for an event reports a failed kernel.
    """

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemoryType = SimpleNamespace(cudaMemoryTypeDevice=2, cudaMemoryTypeManaged=3)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.limit = 10**9
        self.invalidate = False
        self.refuse = ""
        self.fail_events = False
        self.live: set[int] = set()  # streams, events and graphs that are not closed
        self._handles = itertools.count(7)
        self._queues: dict[int, list[Work]] = defaultdict(list)
        self._ran: dict[int, int] = defaultdict(int)
        self._recorded: dict[int, tuple[int, int]] = {}  # by event: stream and how much of its queue
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}

    def queue(self, stream: int, work: Work) -> tuple[Any]:
        """Queue work on a stream, or add it to what the stream captures."""
        self._captures.get(stream, self._queues[stream]).append(work)
        return (OK,)

    def _run(self, stream: int, end: int) -> None:
        while self._ran[stream] < end:
            work = self._queues[stream][self._ran[stream]]
            self._ran[stream] += 1
            work()

    def _new(self) -> int:
        handle = next(self._handles)
        self.live.add(handle)
        return handle

    def _close(self, handle: int) -> tuple[Any]:
        self.live.remove(handle)
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        assert not self._captures, "an allocation within a capture"
        if size > self.limit:
            return OUT_OF_MEMORY, 0
        block = (ctypes.c_ubyte * size)(*[255] * size)  # NaN: whoever reads memory it never wrote finds out
        address = ctypes.addressof(block)
        self.memory[address] = block
        return OK, address

    def cudaFree(self, address: int) -> tuple[Any]:
        del self.memory[address]
        return (OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, int]:
        return self.cudaMalloc(size)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any]:
        if self.refuse == "cudaMemcpyAsync":
            return (FAILED,)
        return self.queue(stream, lambda: ctypes.memmove(target, source, size))

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[Any]:
        assert kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * pitch, width)

        return self.queue(stream, copy)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        return self.queue(stream, lambda: ctypes.memset(address, value, size))

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Any]:
        return self.queue(stream, lambda: [ctypes.memset(address + row * pitch, value, width) for row in range(height)])

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return OK, self._new()

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert stream not in self._captures, "waited for a stream that captures"
        self._run(stream, len(self._queues[stream]))
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any]:
        if event in self._recorded:
            recorded = self._recorded[event]
            self.queue(stream, lambda: self._run(*recorded))
        return (OK,)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        return self._close(stream)

    def cudaEventCreate(self) -> tuple[Any, int]:
        return OK, self._new()

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:
        self._recorded[event] = (stream, len(self._queues[stream]))
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> tuple[Any]:
        if event in self._recorded:
            self._run(*self._recorded[event])
        return (FAILED,) if self.fail_events else (OK,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, float]:
        for stream, count in (self._recorded[start], self._recorded[end]):
            assert self._ran[stream] >= count, "the time of work that is not done"
        return OK, 0.5

    cudaEventDestroy = cudaStreamDestroy

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any]:
        assert stream not in self._captures
        self._captures[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, int]:
        work = self._captures.pop(stream)
        if self.invalidate:
            return INVALIDATED, 0
        graph = self._new()
        self._graphs[graph] = work
        return OK, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        executable = self._new()
        self._graphs[executable] = self._graphs[graph]
        return OK, executable

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Any]:
        if self.refuse == "cudaGraphLaunch":
            return (FAILED,)
        assert executable in self.live
        for work in self._graphs[executable]:
            self.queue(stream, work)
        return (OK,)

    cudaGraphDestroy = cudaGraphExecDestroy = cudaStreamDestroy

    def cudaGetLastError(self) -> tuple[Any]:
        return (OK,)

    def cudaSetDevice(self, index: int) -> tuple[Any]:
        return (OK,)

    def cudaPointerGetAttributes(self, address: int) -> tuple[Any, Any]:
        inside = any(start <= address < start + len(block) for start, block in self.memory.items())
        return OK, SimpleNamespace(device=0, type=2 if inside else 1)

    def cudaGetErrorName(self, status: Any) -> tuple[Any, bytes]:
        return OK, status.name.encode()

    def cudaGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return OK, status.text.encode()


class PretendedConfig:
    """TensorRT-RTX's runtime configuration, which is its own cache: both of a few bytes.

    Attributes:
        compiled: kernels in the cache.
        found: what came from a file.
        dynamic_shapes_kernel_specialization_strategy: as in the bindings.
    """

    def __init__(self) -> None:
        self.compiled = self.found = b""
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.used = False

    def create_runtime_cache(self) -> PretendedConfig:
        return self

    def set_runtime_cache(self, cache: PretendedConfig) -> bool:
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


class PretendedEngine:
    """An engine and its only context: the ONNX model, run on addresses.

    It reads a state only where the fp16 mirror that it was given is this state's: what is out of date becomes NaN.
    """

    def __init__(
        self, gpu: PretendedCuda, onnx: Path, contract: StepContract, copies: tuple[Fp16Mirror, ...] = ()
    ) -> None:
        self.gpu = gpu
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = engine_tensors(contract, copies)
        self.copies = copies
        self.formats = {name: "HWC8" for copy in copies for name in (copy.input, copy.output)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs: list[dict[str, int]] = []
        self.stale = 0  # values of fp16 mirrors that were not their state's
        self.refuse = False
        self.capturable = True
        self.config = PretendedConfig()

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return getattr(tensorrt_rtx.TensorIOMode, "INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = {**self.inputs, **self.outputs}[name].dtype
        return SimpleNamespace(name={"float16": "HALF", "float32": "FLOAT", "int32": "INT32"}[dtype])

    def get_tensor_format(self, name: str) -> Any:
        return getattr(tensorrt_rtx.TensorFormat, self.formats.get(name, "LINEAR"))

    def create_runtime_config(self) -> PretendedConfig:
        return self.config

    def create_execution_context(self, config: PretendedConfig | None = None) -> PretendedEngine:
        return self

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in self.inputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        source = {"y": "x"}.get(name, name.replace("state_out.", "state_in.").replace("half_out.", "half_in."))
        return self.shapes[source]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.gpu.memory, "an address that is not allocated"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuse:
            return False
        if self.config.used and not self.config.compiled:
            self.config.compiled = b"kernels for this GPU"
        addresses = dict(self.addresses)
        assert len(set(addresses.values())) == self.num_io_tensors, "two tensors in one place"
        self.gpu.queue(stream, lambda: self._run(addresses))
        return True

    def _run(self, addresses: dict[str, int]) -> None:
        self.runs.append(addresses)
        feeds = {name: self._at(addresses[name], name, spec.dtype).copy() for name, spec in self.inputs.items()}
        for copy in self.copies:
            state, half = feeds[STATE_IN + copy.state], feeds.pop(copy.input)[..., : self.channels(copy)]
            wanted = half_map(state)[..., : self.channels(copy)]
            stale = (half != wanted) & ~(np.isnan(half) & np.isnan(wanted))
            state[stale.transpose(0, 3, 1, 2)] = np.nan
            self.stale += int(stale.sum())
        names = [name for name in self.outputs if name not in self.formats]
        results = dict(zip(names, self.session.run(names, feeds), strict=True))
        results |= {copy.output: half_map(results[STATE_OUT + copy.state]) for copy in self.copies}
        for name, spec in self.outputs.items():
            self._at(addresses[name], name, spec.dtype)[:] = results[name]

    def channels(self, copy: Fp16Mirror) -> int:
        return self.get_tensor_shape(copy.input)[1]

    def _at(self, address: int, name: str, dtype: str) -> NDArray[Any]:
        shape = self.get_tensor_shape(name)
        shape = half_shape(shape) if name in self.formats else shape
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block: Any = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(block, dtype).reshape(shape)


class Machine:
    """A back end over a model, with the pretended GPU it runs on and the count of its calls.

    Args:
        fp16_mirrors: the engine has the fp16 mirrors of all states, as one with the plugin.
    """

    def __init__(
        self, onnx: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, fp16_mirrors: bool = False
    ) -> None:
        self.path = folder / "model.engine"
        built = onnx.with_suffix(".pretended.engine")  # once for all tests of a model
        if not built.exists():
            options = BuildOptions(min_shapes={"x": (1, 3, 16, 16)}, max_shapes={"x": (3, 3, 32, 32)})
            build_engine(onnx, built, options, say=lambda _: None)
        shutil.copy(built, self.path)
        shutil.copy(sidecar_path(built), sidecar_path(self.path))
        if fp16_mirrors:
            sidecar = read_sidecar(built)
            names = [state.name for state in sidecar.contract.states]
            copies = tuple(Fp16Mirror(name, f"half_in.{name}", f"half_out.{name}") for name in names)
            sidecar_path(self.path).write_text(msgspec.structs.replace(sidecar, fp16_mirrors=copies).to_json())
        checked = check_engine(self.path)
        self.onnx, self.contract = onnx, checked.sidecar.contract
        self.gpu = PretendedCuda()
        self.counted = CountingCuda(self.gpu)
        self.engine = PretendedEngine(self.gpu, onnx, self.contract, checked.sidecar.fp16_mirrors)
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
        discovery = cuda.Discovery((cuda.Gpu(0, "Pretended GPU", "8.9", 1 << 30),), "13.0", "")
        monkeypatch.setattr(tensorrt, "check_engine", lambda *_, **__: found)
        monkeypatch.setattr(cuda, "discover", lambda: discovery)
        monkeypatch.setattr(cuda, "_runtime", lambda: self.counted)

    def open(self) -> TensorRTBackend:
        return TensorRTBackend(self.path, Device("cuda", 0))

    def refuse(self, *, yes: bool) -> None:
        """Let each step fail when it is queued."""
        self.engine.refuse = yes
        self.gpu.refuse = "cudaGraphLaunch" if yes else ""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a tensor of a stack, whose maps are all as large as its frames."""
        channels = {**self.engine.inputs, **self.engine.outputs}[name].shape[1]
        assert isinstance(channels, int)
        return (2, channels, 16, 24)


SYMBOLS = {"batch": 2, "height": 16, "width": 24}


def frames(count: int, batch: int = 2, height: int = 16, width: int = 24) -> list[NDArray[Any]]:
    """Frames of a two-row batch for the sizes above."""
    generator = np.random.default_rng(0)
    return [generator.random((batch, 3, height, width)).astype(np.float16) for _ in range(count)]


def reference(onnx: Path, contract: StepContract, clip: list[NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    """The same steps with plain ONNX Runtime: all graph outputs of every step."""
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
