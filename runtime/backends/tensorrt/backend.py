"""TensorRT back end: runs an engine on a GPU, with the states in device memory.

Every state has two buffers. A step reads one and writes the other, and the next step swaps them: TensorRT does not
guarantee results when an output overlaps an input, and a step that fails leaves the state it started from. Inputs and
outputs have two sets of buffers as well, selected by the same parity (step_buffers.py), so all addresses of a step
follow from its parity. The step of each parity is captured as a CUDA graph once, and then is one launch. A step
allocates nothing, copies no state except those of idle rows, and the host waits for the outputs only. If the engine
takes the fp16 mirror of a state (its sidecar says so), the mirror has two buffers too (state_buffers.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stepcell.contract import StepContract
from stepcell.dims import resolve
from stepcell.errors import DeviceError, EngineMismatchError, InputError, StepcellError
from stepcell.plugins.fp16_mirrors import engine_tensors
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device, StepFuture
from stepcell.runtime.backends.tensorrt.runtime_cache import RuntimeCache
from stepcell.runtime.backends.tensorrt.state_buffers import StateBuffers
from stepcell.runtime.backends.tensorrt.step_buffers import HostAndDevice, StepBuffers
from stepcell.runtime.cuda import DeviceArray
from stepcell.runtime.engine.engine_check import CheckedEngine, check_engine, register_plugins
from stepcell.runtime.engine.sidecar import rebuild_command
from stepcell.runtime.engine.tensorrt_module import Messages, dtype_name, make_logger, no_collection

__all__ = ["TensorRTBackend"]

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """A `Backend` for engines of TensorRT and TensorRT-RTX.

    Args:
        engine: path of a TensorRT plan; its sidecar must be beside it.
        device: a GPU.

    Attributes:
        contract: from the sidecar.
        device: for example "cuda:0".
        description: for example "TensorRT-RTX 1.7.1.116, NVIDIA GeForce RTX 4090".

    Raises:
        EngineMismatchError: the engine does not fit its sidecar, this TensorRT or this GPU.
        DeviceError: there is no such GPU, or it cannot load the engine.
        MissingDependencyError: TensorRT or cuda-bindings is not installed.
    """

    overlaps = True
    skips_idle = False

    def __init__(self, engine: Path, device: Device) -> None:
        checked = check_engine(engine, device=device.index)
        self.contract: StepContract = checked.sidecar.contract
        gpu = _find_gpu(engine, device)
        self.device = str(device)
        self.description = f"{checked.tensorrt.name} {checked.tensorrt.version}, {gpu.name}"
        self._path = engine
        self._index = device.index
        self._sidecar = checked.sidecar
        self._inputs, self._outputs = engine_tensors(self.contract, checked.sidecar.fp16_mirrors)
        self._trt: Any = checked.tensorrt.module
        self._messages = Messages()
        self._logger = make_logger(self._trt, self._messages)
        self._step_buffers: tuple[StepBuffers, ...] = ()  # by parity
        self._states: dict[str, StateBuffers] = {}
        self._parity = 0  # of the next step
        self._resources = ExitStack()  # what `configure` allocates
        self._cache: RuntimeCache | None = None
        cuda.use_device(device.index)
        self._load(checked)
        self._uploads, self._compute, self._downloads = (cuda.Stream() for _ in range(3))

    @property
    def input_stream(self) -> int:
        """Handle of the CUDA stream on which a step reads its inputs."""
        return self._uploads.handle

    @no_collection()
    def _load(self, checked: CheckedEngine) -> None:
        register_plugins(checked)
        self._runtime: Any = self._trt.Runtime(self._logger)
        if checked.sidecar.options.version_compatible:
            # Such a plan contains host code. The checksum in the sidecar has shown that stepcell built it.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(checked.plan)
        if self._engine is None:
            raise EngineMismatchError(
                f"{self._path}: {checked.tensorrt.name} cannot load it: {self._messages.explain()}",
                hint=f"rebuild: {rebuild_command(checked.sidecar, self._path)}",
            )
        self._check_tensors()
        self._context: Any = self._create_context(checked.tensorrt.is_rtx)
        if self._context is None:
            raise DeviceError(f"{self._path}: no execution context: {self._messages.explain()}")

    def _create_context(self, is_rtx: bool) -> Any:
        if not is_rtx:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        # Compile the kernels for the sizes of this loop before the first step: kernels compiled later in the
        # background would not be in the captured graph.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = RuntimeCache(self._path, config)
        return self._engine.create_execution_context(config)

    def _check_tensors(self) -> None:
        """Compare name, direction, dtype and format of every engine tensor with the contract and the fp16 mirrors."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs, outputs = self._inputs, self._outputs
        if sorted(names) != sorted([*inputs, *outputs]):
            raise EngineMismatchError(
                f"{self._path}: tensors in the engine: {', '.join(sorted(names))}; "
                f"in its sidecar: {', '.join(sorted([*inputs, *outputs]))}"
            )
        for name in names:
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            spec = inputs.get(name) if is_input else outputs.get(name)
            dtype = dtype_name(engine.get_tensor_dtype(name))
            if spec is None or spec.dtype != dtype:
                expected = (inputs.get(name) or outputs[name]).dtype
                raise EngineMismatchError(
                    f"{self._path}: {name}: {'input' if is_input else 'output'} of {dtype} in the engine, "
                    f"{'input' if name in inputs else 'output'} of {expected} in its sidecar"
                )
        for name in (name for mirror in self._sidecar.fp16_mirrors for name in (mirror.input, mirror.output)):
            layout = engine.get_tensor_format(name)
            if layout != trt.TensorFormat.HWC8:
                raise EngineMismatchError(
                    f"{self._path}: {name}: format {layout.name} in the engine; the fp16 mirror of a state is HWC8"
                )

    def configure(self, symbols: Mapping[str, int]) -> None:
        """Fix the sizes, allocate all buffers, capture the step and reset the states; see `Backend.configure`.

        Raises:
            InputError: the engine was not built for these sizes.
            DeviceError: the buffers do not fit in memory.
        """
        shapes = {name: resolve(spec.shape, symbols) for name, spec in self._inputs.items()}
        for name in self.contract.graph_inputs:
            shape, profile = shapes[name], self._sidecar.profiles[name]
            if shape not in profile:
                raise InputError(
                    f"{name}: the engine takes {profile.min} to {profile.max}, got {shape}",
                    hint="build it for other sizes with --minShapes, --optShapes and --maxShapes",
                )
        cuda.use_device(self._index)
        self._free_buffers()
        for name, shape in shapes.items():
            self._accept(self._context.set_input_shape(name, shape), f"{name}: shape {shape}")
        for name, spec in self._outputs.items():
            shape, found = resolve(spec.shape, symbols), tuple(self._context.get_tensor_shape(name))
            if found != shape:
                raise EngineMismatchError(f"{self._path}: {name}: {found} in the engine, {shape} in its sidecar")
        try:
            self._allocate(symbols)
            for buffers in self._step_buffers:
                self._warm_up_and_capture(buffers)
            self.reset()
        except StepcellError:
            self._free_buffers()
            raise
        if self._cache is not None:
            self._cache.save()

    def _allocate(self, symbols: Mapping[str, int]) -> None:
        mirrors = {mirror.state: mirror for mirror in self._sidecar.fp16_mirrors}
        self._states = {
            spec.name: StateBuffers(spec, mirrors.get(spec.name), symbols, self._compute, self._own)
            for spec in self.contract.states
        }
        self._step_buffers = tuple(StepBuffers(parity, self.contract, symbols, self._own) for parity in range(2))

    def _warm_up_and_capture(self, buffers: StepBuffers) -> None:
        """Run the step of one parity once, which TensorRT requires before a capture, and capture it as a CUDA graph.

        This writes to the states, so it happens before they get their initial values.
        """
        for data in buffers.inputs.values():
            data.device.clear(self._compute)
        for state in self._states.values():
            state.reset(buffers.parity, None)
        self._execute(buffers)
        self._compute.synchronize()
        try:
            if not getattr(self._context, "is_stream_capturable", lambda _: True)(self._compute.handle):
                raise DeviceError("TensorRT says that this engine cannot be captured")
            buffers.graph = self._own(cuda.Graph.capture(self._compute, lambda: self._execute(buffers)))
        except DeviceError as error:
            if buffers.parity == 0:  # the other parity fails for the same reason
                logger.warning(f"{self._path}: runs without a CUDA graph, which is slower: {error.message}")

    def _execute(self, buffers: StepBuffers) -> None:
        """Queue a step kernel by kernel."""
        for name, data in {**buffers.inputs, **buffers.outputs}.items():
            self._bind(name, data.device)
        for state in self._states.values():
            for name, buffer in state.bindings(buffers.parity):
                self._bind(name, buffer)
        self._accept(self._context.execute_async_v3(self._compute.handle), "the step")

    def step(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> dict[str, NDArray[Any]]:
        """One step; see `Backend.step`."""
        return self.enqueue(inputs, idle).result()

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        """Queue a step; see `Backend.enqueue`. At most two run at a time: a third call first waits for the oldest.

        Raises:
            DeviceError: TensorRT or CUDA failed; the states are those before the step.
        """
        buffers = self._next_buffers()
        self._queue(buffers, inputs, idle)
        buffers.download(self._downloads)
        return self._started(buffers, buffers.outputs)

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """Queue a step; see `Backend.step_on_device`.

        Raises:
            DeviceError: as for `enqueue`.
        """
        buffers = self._next_buffers()
        self._queue(buffers, inputs, ())
        buffers.finished.record(self._compute)
        self._started(buffers, {})
        return {
            name: DeviceArray(
                data.device.address,
                data.host.array.shape,
                data.host.array.dtype,
                self._index,
                stream=self._compute.handle,
                ready=buffers.computed,
                owner=self,
            )
            for name, data in buffers.outputs.items()
        }

    def _next_buffers(self) -> StepBuffers:
        """The buffers of the next step, after the step before the last, which used them, is done."""
        cuda.use_device(self._index)
        buffers = self._step_buffers[self._parity]
        if buffers.running is not None:
            buffers.running.result()
        return buffers

    def _queue(
        self, buffers: StepBuffers, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int]
    ) -> None:
        """Queue a step without its download.

        If this fails half-way, `_parity` is not flipped, and the next step overwrites everything this one wrote.
        """
        buffers.upload(inputs, self._uploads)
        self._compute.wait(buffers.uploaded)
        buffers.began.record(self._compute)
        if buffers.graph is None:
            self._execute(buffers)
        else:
            buffers.graph.launch(self._compute)
        if idle:
            for state in self._states.values():
                state.keep(buffers.parity, idle)
        buffers.computed.record(self._compute)

    def _started(
        self, buffers: StepBuffers, outputs: Mapping[str, HostAndDevice]
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        """The future of a step that is queued, which returns copies of these outputs."""
        buffers.running = StepFuture(lambda: self._collect(buffers, outputs))
        self._parity = 1 - buffers.parity
        return buffers.running

    def _collect(self, buffers: StepBuffers, outputs: Mapping[str, HostAndDevice]) -> dict[str, NDArray[Any]]:
        cuda.use_device(self._index)
        buffers.running = None
        try:
            buffers.wait()
        except DeviceError:
            if self._parity != buffers.parity:  # no later step has read what this one wrote: undo it
                self._parity = buffers.parity
            raise
        return {name: data.host.array.copy() for name, data in outputs.items()}

    def step_milliseconds(self) -> dict[str, float]:
        """GPU time of the last step, which must be done, in ms: "copy_in", "compute" and "copy_out"."""
        return self._step_buffers[1 - self._parity].milliseconds()

    def interrupt(self) -> None:
        """Nothing: work on a GPU cannot be ended."""

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        """Set the states to their initial values; see `Backend.reset`."""
        cuda.use_device(self._index)
        for state in self._states.values():
            state.reset(self._parity, rows)

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state on the host, after all steps that were queued."""
        cuda.use_device(self._index)
        arrays = {name: state.read(self._parity) for name, state in self._states.items()}
        self._compute.synchronize()
        return arrays

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace every state; see `Backend.write_state`."""
        cuda.use_device(self._index)
        for name, buffers in self._states.items():
            buffers.write(self._parity, state[name])

    def read_row(self, row: int) -> dict[str, NDArray[Any]]:
        """A copy of one row of every state on the host, after all steps that were queued."""
        cuda.use_device(self._index)
        return {name: state.read_row(self._parity, row) for name, state in self._states.items()}

    def write_row(self, row: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace one row of every state; see `Backend.write_row`."""
        cuda.use_device(self._index)
        for name, buffers in self._states.items():
            buffers.write_row(self._parity, row, state[name])

    def close(self) -> None:
        """Free everything on the device. Calling it twice is allowed."""
        if self._engine is None:
            return
        cuda.use_device(self._index)
        self._free_buffers()
        self._context = self._cache = self._engine = self._runtime = None  # in this order: each uses the next
        for stream in (self._uploads, self._compute, self._downloads):
            stream.close()

    def _own(self, resource: Any) -> Any:
        self._resources.callback(resource.close)
        return resource

    def _free_buffers(self) -> None:
        for buffers in self._step_buffers:
            if buffers.running is not None:
                with contextlib.suppress(StepcellError):  # raised again by the caller's `result()`
                    buffers.running.result()
        self._step_buffers, self._states, self._parity = (), {}, 0
        self._resources.close()

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
