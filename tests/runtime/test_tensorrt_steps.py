"""The step logic of the TensorRT back end on a pretended GPU.

There is no GPU where these tests run, so CUDA and the loaded engine are played by the host:
"device" memory is host memory, queued work runs when its stream is waited for, and the engine is
ONNX Runtime reading and writing the addresses it was given. Everything between them is real: the
engine file, its sidecar and the back end. What this cannot show is TensorRT's own arithmetic.
"""

# ruff: noqa: N802, N815  # CUDA's names

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tensorrt_rtx
from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.errors import DeviceError, EngineMismatchError, InputError, StateError
from stepcell.runtime import StepLoop, cuda, tensorrt
from stepcell.runtime.backend import Backend, Device
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.check import CheckedEngine, check_engine
from stepcell.runtime.engine.flavor import TensorRT
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.tensorrt import TensorRTBackend

OK = SimpleNamespace(value=0)
OUT_OF_MEMORY = SimpleNamespace(value=2)


class PretendedCuda:
    """The calls of the CUDA runtime that `stepcell.runtime.cuda` makes."""

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.queue: list[Callable[[], Any]] = []
        self.limit = 10**9
        self.allocations = 0
        self.row_copies = 0

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        self.allocations += 1
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

    def _queued(self, work: Callable[[], Any]) -> tuple[Any]:
        self.queue.append(work)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any]:
        return self._queued(lambda: ctypes.memmove(target, source, size))

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[Any]:
        assert kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        assert stream == 7, "not on the stream of the back end"
        self.row_copies += 1

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * pitch, width)

        return self._queued(copy)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        return self._queued(lambda: ctypes.memset(address, value, size))

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Any]:
        return self._queued(lambda: [ctypes.memset(address + row * pitch, value, width) for row in range(height)])

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        queue, self.queue = self.queue, []
        for work in queue:
            work()
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return OK, 7

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, float]:
        return OK, 0.5

    def cudaEventCreate(self) -> tuple[Any, int]:
        return OK, 1

    def cudaSetDevice(self, index: int) -> tuple[Any]:
        return (OK,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:
        return (OK,)

    def cudaEventDestroy(self, event: int) -> tuple[Any]:
        return (OK,)

    cudaStreamDestroy = cudaSetDevice

    def cudaGetErrorName(self, status: Any) -> tuple[Any, bytes]:
        return OK, b"cudaErrorMemoryAllocation"

    def cudaGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return OK, b"out of memory"


class PretendedEngine:
    """An engine and its only context: the ONNX model, run on addresses."""

    def __init__(self, gpu: PretendedCuda, onnx: Path, contract: StepContract) -> None:
        self.gpu = gpu
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = dict(contract.graph_inputs), dict(contract.graph_outputs)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs: list[dict[str, int]] = []
        self.refuse = False

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

    def create_execution_context(self) -> PretendedEngine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in self.inputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        source = {"y": "x"}.get(name, name.replace("state_out.", "state_in."))
        return self.shapes[source]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.gpu.memory, "an address that is not allocated"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuse:
            return False
        assert stream == 7, "not on the stream of the back end"
        addresses = dict(self.addresses)
        assert len(set(addresses.values())) == self.num_io_tensors, "two tensors in one place"
        self.runs.append(addresses)
        self.gpu.queue.append(lambda: self._run(addresses))
        return True

    def _run(self, addresses: dict[str, int]) -> None:
        feeds = {name: self._at(addresses[name], name, spec.dtype).copy() for name, spec in self.inputs.items()}
        results = self.session.run(list(self.outputs), feeds)
        for (name, spec), result in zip(self.outputs.items(), results, strict=True):
            self._at(addresses[name], name, spec.dtype)[:] = result

    def _at(self, address: int, name: str, dtype: str) -> NDArray[Any]:
        shape = self.get_tensor_shape(name)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block: Any = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(block, dtype).reshape(shape)


class Machine:
    """A back end over a model, with the pretended GPU it runs on."""

    def __init__(self, onnx: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "model.engine"
        options = BuildOptions(min_shapes={"x": (1, 3, 16, 16)}, max_shapes={"x": (3, 3, 32, 32)})
        build_engine(onnx, self.path, options, say=lambda _: None)
        checked = check_engine(self.path)
        self.onnx, self.contract = onnx, checked.sidecar.contract
        self.gpu = PretendedCuda()
        self.engine = PretendedEngine(self.gpu, onnx, self.contract)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine if plan == checked.plan else None)
        module = SimpleNamespace(
            __version__=checked.tensorrt.version,
            ILogger=tensorrt_rtx.ILogger,
            TensorIOMode=tensorrt_rtx.TensorIOMode,
            Runtime=lambda _: runtime,
        )
        found = CheckedEngine(checked.plan, checked.sidecar, TensorRT("tensorrt-rtx", module))
        discovery = cuda.Discovery((cuda.Gpu(0, "Pretended GPU", "8.9", 1 << 30),), "13.0", "")
        monkeypatch.setattr(tensorrt, "check_engine", lambda *_, **__: found)
        monkeypatch.setattr(cuda, "discover", lambda: discovery)
        monkeypatch.setattr(cuda, "_runtime", lambda: self.gpu)

    def open(self) -> TensorRTBackend:
        return TensorRTBackend(self.path, Device("cuda", 0))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a tensor of a stack, whose maps are all as large as its frames."""
        channels = {**self.contract.graph_inputs, **self.contract.graph_outputs}[name].shape[1]
        assert isinstance(channels, int)
        return (2, channels, 16, 24)


@pytest.fixture
def machine(denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(denoiser_onnx, tmp_path, monkeypatch)


@pytest.fixture
def backend(machine: Machine) -> Iterator[TensorRTBackend]:
    backend = machine.open()
    yield backend
    backend.close()
    assert not machine.gpu.memory, "memory that was never freed"


SYMBOLS = {"batch": 2, "height": 16, "width": 24}


def frames(count: int, batch: int = 2, height: int = 16, width: int = 24) -> list[NDArray[Any]]:
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


def test_many_steps_equal_plain_onnx_runtime(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(25)
    expected = reference(machine.onnx, machine.contract, clip)
    results = [backend.step({"x": frame}) for frame in clip]
    for result, outputs in zip(results, expected, strict=True):  # compared at the end: results are the caller's
        np.testing.assert_array_equal(result["y"], outputs["y"])
    np.testing.assert_array_equal(backend.read_state()["h"], expected[-1]["state_out.h"])


def test_several_states_of_different_kinds(stack_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(stack_onnx, tmp_path, monkeypatch)
    backend = machine.open()
    machine.engine.get_tensor_shape = machine.shape_of  # type: ignore[method-assign]
    backend.configure(SYMBOLS)
    clip = frames(9)
    expected = reference(stack_onnx, machine.contract, clip)
    for frame, outputs in zip(clip, expected, strict=True):
        np.testing.assert_array_equal(backend.step({"x": frame})["y"], outputs["y"])
        for name, value in backend.read_state().items():
            np.testing.assert_array_equal(value, outputs[f"state_out.{name}"])
    backend.close()


def test_state_buffers_change_places_and_nothing_is_allocated(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    before = machine.gpu.allocations
    for frame in frames(4):
        backend.step({"x": frame})
    assert machine.gpu.allocations == before
    runs = machine.engine.runs
    for earlier, later in itertools.pairwise(runs):
        assert later["state_in.h"] == earlier["state_out.h"]
        assert later["state_out.h"] == earlier["state_in.h"]
        assert later["x"] == earlier["x"]


def test_reset_of_all_is_a_fresh_start(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(3)
    first = [backend.step({"x": frame})["y"] for frame in clip]
    backend.reset()
    again = [backend.step({"x": frame})["y"] for frame in clip]
    np.testing.assert_array_equal(first, again)


def test_reset_selects_slots_and_keeps_the_others(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    for frame in frames(3):
        backend.step({"x": frame})
    poisoned = backend.read_state()
    poisoned["h"][1] = np.nan
    backend.write_state(poisoned)
    backend.reset([False, True])
    state = backend.read_state()["h"]
    np.testing.assert_array_equal(state[0], poisoned["h"][0])
    np.testing.assert_array_equal(state[1], 0)
    with pytest.raises(StateError, match="expected 2 slots, got 3"):
        backend.reset([True] * 3)


def test_idle_rows_keep_their_states_and_only_they_are_copied(machine: Machine, backend: Backend) -> None:
    backend.configure({**SYMBOLS, "batch": 3})
    clip = frames(12, 3)
    for frame in clip[:2]:
        backend.step({"x": frame})
    assert machine.gpu.row_copies == 0
    before, allocations = backend.read_state()["h"], machine.gpu.allocations
    busy = reference(machine.onnx, machine.contract, clip)
    for frame, outputs in zip(clip[2:], busy[2:], strict=True):
        y = backend.step({"x": frame}, idle=[0, 2])["y"]
        np.testing.assert_array_equal(y[1], outputs["y"][1])
        state = backend.read_state()["h"]
        assert state[0].tobytes() == before[0].tobytes()
        assert state[2].tobytes() == before[2].tobytes()
        np.testing.assert_array_equal(state[1], outputs["state_out.h"][1])
    assert machine.gpu.row_copies == 2 * len(clip[2:])
    assert machine.gpu.allocations == allocations


def test_failed_step_with_idle_rows_keeps_the_state(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    first, second = frames(2)
    backend.step({"x": first})
    before = backend.read_state()["h"]
    machine.engine.refuse = True
    with pytest.raises(DeviceError):
        backend.step({"x": second}, idle=[1])
    np.testing.assert_array_equal(backend.read_state()["h"], before)


def test_loop_with_slots_equals_the_same_loop_on_the_cpu(machine: Machine, tmp_path: Path) -> None:
    """The loop's logic on this back end: slots at different rates, resets, and a snapshot there and back."""
    path = tmp_path / "state.safetensors"
    cpu = StepLoop.open(machine.onnx, slots=3, keep_float16=True)
    gpu = StepLoop(machine.open(), name="engine", slots=3)
    clip = frames(40, 1)
    names = ["a", "b", "c"]
    for number, frame in enumerate(clip):
        for loop in (cpu, gpu):
            if number == 0:
                for name in names[:2]:
                    loop.attach(name)
            if number == 10:
                loop.detach(loop.slots["a"])
                loop.attach("c")
            if number == 20:
                loop.reset([loop.slots["b"]])
        if number == 15:
            gpu.save(path)
            cpu.restore(path)
        if number == 25:
            cpu.save(path)
            gpu.restore(path)
        expected, found = (
            loop.step_slots(
                {slot: {"x": frame} for index, slot in enumerate(loop.slots.values()) if number % (index + 1) == 0}
            )
            for loop in (cpu, gpu)
        )
        for (cpu_slot, wanted), (gpu_slot, got) in zip(expected.items(), found.items(), strict=True):
            assert cpu_slot.name == gpu_slot.name
            np.testing.assert_array_equal(got["y"], wanted["y"], err_msg=f"step {number}")
    rows = [slot.index for slot in gpu.slots.values()]
    np.testing.assert_array_equal(gpu.state()["h"][rows], cpu.state()["h"][rows])
    cpu.close()
    gpu.close()
    assert not machine.gpu.memory


def test_learned_initial_states(learned_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(learned_onnx, tmp_path, monkeypatch)
    machine.engine.get_tensor_shape = machine.shape_of  # type: ignore[method-assign]
    backend = machine.open()
    backend.configure(SYMBOLS)
    start = {state.name: state.initial((2, state.shape[1], 16, 24)) for state in machine.contract.states}  # type: ignore[arg-type]
    assert start["h0"].any()
    assert start["c1"].any()
    for slots in (None, [True, True]):
        for name, value in backend.read_state().items():
            np.testing.assert_array_equal(value, start[name], err_msg=name)
        for frame in frames(3):
            backend.step({"x": frame.astype(np.float32)})
        backend.reset(slots)
    backend.step({"x": frames(1)[0].astype(np.float32)})
    before = backend.read_state()
    before["h0"][1] = np.nan
    backend.write_state(before)
    backend.reset([False, True])
    for name, value in backend.read_state().items():
        np.testing.assert_array_equal(value[1], start[name][1])
        np.testing.assert_array_equal(value[0], before[name][0])
    backend.close()
    assert not machine.gpu.memory


def test_snapshot_comes_back(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(6)
    for frame in clip[:3]:
        backend.step({"x": frame})
    snapshot = backend.read_state()
    rest = [backend.step({"x": frame})["y"] for frame in clip[3:]]
    backend.write_state(snapshot)
    np.testing.assert_array_equal([backend.step({"x": frame})["y"] for frame in clip[3:]], rest)


def test_other_sizes_start_anew(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    backend.step({"x": frames(1)[0]})
    held = len(machine.gpu.memory)
    backend.configure({"batch": 1, "height": 32, "width": 32})
    assert len(machine.gpu.memory) == held
    clip = frames(3, 1, 32, 32)
    for frame, expected in zip(clip, reference(machine.onnx, machine.contract, clip), strict=True):
        np.testing.assert_array_equal(backend.step({"x": frame})["y"], expected["y"])


def test_sizes_outside_the_profile_are_refused(backend: Backend) -> None:
    with pytest.raises(InputError) as caught:
        backend.configure({"batch": 4, "height": 16, "width": 16})
    assert "x: the engine takes (1, 3, 16, 16) to (3, 3, 32, 32), got (4, 3, 16, 16)" in caught.value.message


def test_failed_step_keeps_the_state(machine: Machine, backend: Backend) -> None:
    backend.configure(SYMBOLS)
    clip = frames(4)
    for frame in clip[:2]:
        backend.step({"x": frame})
    machine.engine.refuse = True
    with pytest.raises(DeviceError, match="TensorRT refused the step"):
        backend.step({"x": clip[2]})
    machine.engine.refuse = False
    expected = reference(machine.onnx, machine.contract, clip)
    for frame, outputs in zip(clip[2:], expected[2:], strict=True):
        np.testing.assert_array_equal(backend.step({"x": frame})["y"], outputs["y"])


def test_out_of_memory_says_so_and_frees_what_was_taken(machine: Machine, backend: Backend) -> None:
    machine.gpu.limit = 4000
    with pytest.raises(DeviceError) as caught:
        backend.configure(SYMBOLS)
    assert caught.value.exit_code == 6
    assert "cudaErrorMemoryAllocation: out of memory (asked for 4.6 kB of pinned host memory)" in caught.value.message
    assert "fewer streams" in str(caught.value.hint)
    assert not machine.gpu.memory


def test_description_and_times(backend: TensorRTBackend) -> None:
    assert backend.device == "cuda:0"
    assert backend.description == f"TensorRT-RTX {tensorrt_rtx.__version__}, Pretended GPU"
    backend.configure(SYMBOLS)
    backend.step({"x": frames(1)[0]})
    assert backend.step_milliseconds() == {"copy_in": 0.5, "compute": 0.5, "copy_out": 0.5}


def test_close_twice(machine: Machine) -> None:
    backend = machine.open()
    backend.configure(SYMBOLS)
    backend.close()
    backend.close()
    assert not machine.gpu.memory


def test_engine_whose_tensors_differ_from_the_contract_is_refused(machine: Machine) -> None:
    import msgspec

    right = machine.engine.inputs
    machine.engine.inputs = {name: spec for name, spec in right.items() if name != "x"}
    with pytest.raises(
        EngineMismatchError, match=r"tensors in the engine: state_in\.h, state_out\.h, y; in its contract"
    ):
        machine.open()
    machine.engine.inputs = {**right, "x": msgspec.structs.replace(right["x"], dtype="int32")}
    with pytest.raises(EngineMismatchError, match="x: input of int32 in the engine, input of float16 in its contract"):
        machine.open()


def test_engine_that_does_not_load_is_refused(machine: Machine) -> None:
    machine.engine = None  # type: ignore[assignment]
    with pytest.raises(EngineMismatchError, match="TensorRT-RTX cannot load it") as caught:
        machine.open()
    assert "rebuild: stepcell build" in str(caught.value.hint)
