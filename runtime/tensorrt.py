"""The TensorRT back end: states live on the GPU and never leave it unasked.

Each state has two buffers. A step reads one and writes the other, then they change places:
TensorRT does not promise right results where an output lies over an input, and a step that fails
leaves the state it started from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StateSpec, StepContract
from stepcell.dims import resolve
from stepcell.errors import DeviceError, EngineMismatchError, InputError, StateError
from stepcell.runtime import cuda
from stepcell.runtime.backend import Device
from stepcell.runtime.engine.check import CheckedEngine, check_engine
from stepcell.runtime.engine.flavor import Messages, dtype_name, make_logger
from stepcell.runtime.engine.sidecar import rebuild_command

__all__ = ["TensorRTBackend"]


@dataclass(frozen=True)
class _Data:
    """A data input or output: page-locked host memory and its copy on the device."""

    host: cuda.PinnedArray
    device: cuda.DeviceBuffer


@dataclass(frozen=True)
class _State:
    """A state: `buffers[parity]` is read by the next step, the other one written.

    `initial` is one row of its initial value on the device; None: zeros.
    """

    spec: StateSpec
    shape: tuple[int, ...]
    buffers: tuple[cuda.DeviceBuffer, cuda.DeviceBuffer]
    initial: cuda.DeviceBuffer | None

    def rows(self, buffer: cuda.DeviceBuffer, count: int | None = None) -> cuda.Rows:
        """A buffer of this state by rows of its batch axis; `count`: of another number of rows."""
        axis = self.spec.batch_axis
        shape = (*self.shape[:axis], count or self.shape[axis], *self.shape[axis + 1 :])
        return cuda.Rows.of(buffer.address, shape, axis, np.dtype(self.spec.dtype).itemsize)


class TensorRTBackend:
    """Runs an engine of either TensorRT flavour; see `stepcell.runtime.backend.Backend`.

    Args:
        engine: a plan with its sidecar beside it.
        device: a GPU.

    Attributes:
        contract: from the sidecar.
        device: "cuda:0".
        description: "TensorRT-RTX 1.7.1.116, NVIDIA GeForce RTX 4090".

    Raises:
        EngineMismatchError: the engine does not fit its sidecar, this TensorRT or this GPU.
        DeviceError: there is no such GPU, or it cannot load the engine.
        MissingDependencyError: TensorRT or cuda-bindings is missing.
    """

    def __init__(self, engine: Path, device: Device) -> None:
        checked = check_engine(engine, device=device.index)
        self.contract: StepContract = checked.sidecar.contract
        gpu = _find_gpu(engine, device)
        self.device = str(device)
        self.description = f"{checked.tensorrt.name} {checked.tensorrt.version}, {gpu.name}"
        self._path = engine
        self._index = device.index
        self._sidecar = checked.sidecar
        self._trt: Any = checked.tensorrt.module
        self._messages = Messages()
        self._logger = make_logger(self._trt, self._messages)
        self._inputs: dict[str, _Data] = {}
        self._outputs: dict[str, _Data] = {}
        self._states: dict[str, _State] = {}
        self._parity = 0
        self._buffers = ExitStack()
        cuda.use_device(device.index)
        self._load(checked)
        self._stream = cuda.Stream()
        self._events = [cuda.Event() for _ in range(4)]

    def _load(self, checked: CheckedEngine) -> None:
        self._runtime: Any = self._trt.Runtime(self._logger)
        if checked.sidecar.options.version_compatible:
            # Such a plan carries code for the host; the sidecar has just shown it to be ours.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(checked.plan)
        if self._engine is None:
            raise EngineMismatchError(
                f"{self._path}: {checked.tensorrt.name} cannot load it: {self._messages.explain()}",
                hint=f"rebuild: {rebuild_command(checked.sidecar, self._path)}",
            )
        self._check_tensors()
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise DeviceError(f"{self._path}: no execution context: {self._messages.explain()}")

    def _check_tensors(self) -> None:
        """Every tensor of the engine against the contract: name, direction, dtype."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs, outputs = self.contract.graph_inputs, self.contract.graph_outputs
        if sorted(names) != sorted([*inputs, *outputs]):
            raise EngineMismatchError(
                f"{self._path}: tensors in the engine: {', '.join(sorted(names))}; "
                f"in its contract: {', '.join(sorted([*inputs, *outputs]))}"
            )
        for name in names:
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            spec = inputs.get(name) if is_input else outputs.get(name)
            dtype = dtype_name(engine.get_tensor_dtype(name))
            if spec is None or spec.dtype != dtype:
                expected = (inputs.get(name) or outputs[name]).dtype
                raise EngineMismatchError(
                    f"{self._path}: {name}: {'input' if is_input else 'output'} of {dtype} in the engine, "
                    f"{'input' if name in inputs else 'output'} of {expected} in its contract"
                )

    def configure(self, symbols: Mapping[str, int]) -> None:
        """Fix the sizes and allocate every buffer; states start at their initial value.

        Raises:
            InputError: sizes the engine was not built for.
            DeviceError: the buffers do not fit in memory.
        """
        shapes = {name: resolve(spec.shape, symbols) for name, spec in self.contract.graph_inputs.items()}
        for name, shape in shapes.items():
            profile = self._sidecar.profiles[name]
            if shape not in profile:
                raise InputError(
                    f"{name}: the engine takes {profile.min} to {profile.max}, got {shape}",
                    hint="build it for other sizes with --minShapes, --optShapes and --maxShapes",
                )
        cuda.use_device(self._index)
        self._free_buffers()
        for name, shape in shapes.items():
            self._accept(self._context.set_input_shape(name, shape), f"{name}: shape {shape}")
        for name, spec in self.contract.graph_outputs.items():
            shape, found = resolve(spec.shape, symbols), tuple(self._context.get_tensor_shape(name))
            if found != shape:
                raise EngineMismatchError(f"{self._path}: {name}: {found} in the engine, {shape} in its contract")
        try:
            self._allocate(symbols)
        except DeviceError:
            self._free_buffers()
            raise

    def _allocate(self, symbols: Mapping[str, int]) -> None:
        self._inputs = {spec.name: self._data(spec, symbols) for spec in self.contract.inputs}
        self._outputs = {spec.name: self._data(spec, symbols) for spec in self.contract.outputs}
        for state in self.contract.states:
            shape = resolve(state.shape, symbols)
            nbytes = int(np.prod(shape)) * np.dtype(state.dtype).itemsize
            buffers = (self._own(cuda.DeviceBuffer(nbytes)), self._own(cuda.DeviceBuffer(nbytes)))
            self._states[state.name] = _State(state, shape, buffers, self._initial(state, shape))
        for name, data in {**self._inputs, **self._outputs}.items():
            self._bind(name, data.device)
        self.reset()

    def _initial(self, state: StateSpec, shape: tuple[int, ...]) -> cuda.DeviceBuffer | None:
        if state.init == "zeros":
            return None
        axis = state.batch_axis
        row = np.ascontiguousarray(state.initial((*shape[:axis], 1, *shape[axis + 1 :])))
        buffer: cuda.DeviceBuffer = self._own(cuda.DeviceBuffer(row.nbytes))
        cuda.copy_to_device(buffer, row, self._stream)
        self._stream.synchronize()
        return buffer

    def _data(self, spec: Spec, symbols: Mapping[str, int]) -> _Data:
        host = self._own(cuda.PinnedArray(resolve(spec.shape, symbols), spec.dtype))
        return _Data(host, self._own(cuda.DeviceBuffer(host.array.nbytes)))

    def step(self, inputs: Mapping[str, NDArray[Any]], idle: Sequence[int] = ()) -> dict[str, NDArray[Any]]:
        """One step; see `Backend.step`. Nothing is allocated on the device; only idle rows of states are copied.

        Raises:
            DeviceError: TensorRT or CUDA failed; the states are those before the step.
        """
        cuda.use_device(self._index)
        started, copied, computed, finished = self._events
        started.record(self._stream)
        for name, data in self._inputs.items():
            np.copyto(data.host.array, inputs[name])
            cuda.copy_to_device(data.device, data.host.array, self._stream)
        copied.record(self._stream)
        for state in self._states.values():
            self._bind(state.spec.input, state.buffers[self._parity])
            self._bind(state.spec.output, state.buffers[1 - self._parity])
        self._accept(self._context.execute_async_v3(self._stream.handle), "the step")
        if idle:
            self._keep(idle)
        computed.record(self._stream)
        for data in self._outputs.values():
            cuda.copy_to_host(data.host.array, data.device, self._stream)
        finished.record(self._stream)
        self._stream.synchronize()
        self._parity = 1 - self._parity
        return {name: data.host.array.copy() for name, data in self._outputs.items()}

    def _keep(self, idle: Sequence[int]) -> None:
        """Queue copies of idle rows from the buffers the step reads to those it writes."""
        for state in self._states.values():
            old, new = (state.rows(state.buffers[parity]) for parity in (self._parity, 1 - self._parity))
            for row in idle:
                cuda.copy_row(new, row, old, row, self._stream)

    def step_milliseconds(self) -> dict[str, float]:
        """Time on the GPU of the last step: "copy_in", "compute", "copy_out"."""
        started, copied, computed, finished = self._events
        return {
            "copy_in": copied.milliseconds_since(started),
            "compute": computed.milliseconds_since(copied),
            "copy_out": finished.milliseconds_since(computed),
        }

    def reset(self, slots: Sequence[bool] | None = None) -> None:
        """All states to their initial value, or the rows of their batch axis that are True and no others."""
        cuda.use_device(self._index)
        for state in self._states.values():
            current, count = state.buffers[self._parity], state.shape[state.spec.batch_axis]
            if slots is not None and len(slots) != count:
                raise StateError(f"reset: expected {count} slots, got {len(slots)}")
            if slots is None and state.initial is None:
                current.clear(self._stream)
                continue
            rows = state.rows(current)
            for row in range(count) if slots is None else np.flatnonzero(slots).tolist():
                if state.initial is None:
                    cuda.clear_row(rows, row, self._stream)
                else:
                    cuda.copy_row(rows, row, state.rows(state.initial, 1), 0, self._stream)

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state on the host."""
        cuda.use_device(self._index)
        arrays = {}
        for name, state in self._states.items():
            arrays[name] = np.empty(state.shape, state.spec.dtype)
            cuda.copy_to_host(arrays[name], state.buffers[self._parity], self._stream)
        self._stream.synchronize()
        return arrays

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace every state; names, dtypes and shapes are the contract's."""
        cuda.use_device(self._index)
        kept = []
        for name, own in self._states.items():
            array = np.ascontiguousarray(state[name])
            kept.append(array)  # the copy reads it until the stream is done
            cuda.copy_to_device(own.buffers[self._parity], array, self._stream)
        self._stream.synchronize()

    def close(self) -> None:
        """Free everything on the device. Calling it twice is allowed."""
        if self._engine is None:
            return
        cuda.use_device(self._index)
        self._free_buffers()
        self._context = self._engine = self._runtime = None  # in this order: each needs the next
        for event in self._events:
            event.close()
        self._stream.close()

    def _own(self, resource: Any) -> Any:
        self._buffers.callback(resource.close)
        return resource

    def _free_buffers(self) -> None:
        self._inputs, self._outputs, self._states, self._parity = {}, {}, {}, 0
        self._buffers.close()

    def _bind(self, name: str, buffer: cuda.DeviceBuffer) -> None:
        self._accept(self._context.set_tensor_address(name, buffer.address), f"{name}: its address")

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise DeviceError(f"{self._path}: TensorRT refused {what}: {self._messages.explain()}")


def _find_gpu(engine: Path, device: Device) -> cuda.Gpu:
    found = cuda.discover()
    for gpu in found.devices:
        if gpu.index == device.index:
            return gpu
    there = ", ".join(f"cuda:{gpu.index} {gpu.name}" for gpu in found.devices) or f"no GPU ({found.problem})"
    raise DeviceError(
        f"{engine}: an engine runs on an NVIDIA GPU; {device} was asked for, this machine has {there}",
        hint="on a machine with no GPU run the .onnx file instead: --device cpu",
    )
