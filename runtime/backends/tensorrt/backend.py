"""The TensorRT back end: states live on the GPU and never leave it unasked.

Each state has two buffers. A step reads one and writes the other, then they change places:
TensorRT does not promise right results where an output lies over an input, and a step that fails
leaves the state it started from. Inputs and outputs have two buffers as well, which the same parity
chooses (`stepcell.runtime.backends.tensorrt.step_buffers`), so all addresses of a step are known by
its parity: each parity is captured as a CUDA graph once, and a step is one launch. Within a step
nothing is allocated, no state is copied but those of idle rows, and the host waits for nothing but
the outputs. Where the engine takes the fp16 mirror of a state (its sidecar says so), that has two
buffers beside the state's.
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
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.step_future import Pending
from stepcell.runtime.backends.tensorrt.runtime_cache import RuntimeCache
from stepcell.runtime.backends.tensorrt.state_buffers import DeviceState
from stepcell.runtime.backends.tensorrt.step_buffers import Data, Turn
from stepcell.runtime.cuda import DeviceArray
from stepcell.runtime.engine.check import CheckedEngine, check_engine, register_plugins
from stepcell.runtime.engine.sidecar import rebuild_command
from stepcell.runtime.engine.tensorrt_module import Messages, dtype_name, make_logger, no_collection

__all__ = ["TensorRTBackend"]

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """Runs an engine of either TensorRT flavour; see `stepcell.runtime.backends.base.Backend`.

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
        self._inputs, self._outputs = engine_tensors(self.contract, checked.sidecar.fp16_mirrors)
        self._trt: Any = checked.tensorrt.module
        self._messages = Messages()
        self._logger = make_logger(self._trt, self._messages)
        self._turns: tuple[Turn, ...] = ()
        self._states: dict[str, DeviceState] = {}
        self._parity = 0  # of the next step
        self._buffers = ExitStack()
        self._cache: RuntimeCache | None = None
        cuda.use_device(device.index)
        self._load(checked)
        self._uploads, self._compute, self._downloads = (cuda.Stream() for _ in range(3))

    @property
    def input_stream(self) -> int:
        """Handle of the stream on which a step reads its inputs."""
        return self._uploads.handle

    @no_collection()
    def _load(self, checked: CheckedEngine) -> None:
        register_plugins(checked)
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
        self._context: Any = self._create_context(checked.tensorrt.is_rtx)
        if self._context is None:
            raise DeviceError(f"{self._path}: no execution context: {self._messages.explain()}")

    def _create_context(self, is_rtx: bool) -> Any:
        if not is_rtx:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        # Kernels for the sizes of this loop before the first step: what is compiled later, in the
        # background, would not be in a graph that is captured now.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = RuntimeCache(self._path, config)
        return self._engine.create_execution_context(config)

    def _check_tensors(self) -> None:
        """Every tensor of the engine against the contract and the fp16 mirrors: name, direction, dtype, format."""
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
        for name in (name for copy in self._sidecar.fp16_mirrors for name in (copy.input, copy.output)):
            layout = engine.get_tensor_format(name)
            if layout != trt.TensorFormat.HWC8:
                raise EngineMismatchError(
                    f"{self._path}: {name}: format {layout.name} in the engine; the fp16 mirror of a state is HWC8"
                )

    def configure(self, symbols: Mapping[str, int]) -> None:
        """Fix the sizes and allocate every buffer; states start at their initial value.

        Raises:
            InputError: sizes the engine was not built for.
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
            for turn in self._turns:
                self._prepare(turn)
            self.reset()
        except StepcellError:
            self._free_buffers()
            raise
        if self._cache is not None:
            self._cache.save()

    def _allocate(self, symbols: Mapping[str, int]) -> None:
        copies = {copy.state: copy for copy in self._sidecar.fp16_mirrors}
        self._states = {
            spec.name: DeviceState(spec, copies.get(spec.name), symbols, self._compute, self._own)
            for spec in self.contract.states
        }
        self._turns = tuple(Turn(parity, self.contract, symbols, self._own) for parity in range(2))

    def _prepare(self, turn: Turn) -> None:
        """Run a turn's step once, which TensorRT needs before a capture, and capture it.

        This writes to the states, so it is done before they get their initial values.
        """
        for data in turn.inputs.values():
            data.device.clear(self._compute)
        for state in self._states.values():
            state.reset(turn.parity, None)
        self._execute(turn)
        self._compute.synchronize()
        try:
            if not getattr(self._context, "is_stream_capturable", lambda _: True)(self._compute.handle):
                raise DeviceError("TensorRT says that this engine cannot be captured")
            turn.graph = self._own(cuda.Graph.capture(self._compute, lambda: self._execute(turn)))
        except DeviceError as error:
            if turn.parity == 0:  # the other one is refused alike
                logger.warning(f"{self._path}: runs without a CUDA graph, which is slower: {error.message}")

    def _execute(self, turn: Turn) -> None:
        """Queue a turn's step, kernel by kernel."""
        for name, data in {**turn.inputs, **turn.outputs}.items():
            self._bind(name, data.device)
        for state in self._states.values():
            for name, buffer in state.bindings(turn.parity):
                self._bind(name, buffer)
        self._accept(self._context.execute_async_v3(self._compute.handle), "the step")

    def step(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> dict[str, NDArray[Any]]:
        """`enqueue` and wait."""
        return self.enqueue(inputs, idle).wait()

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> Pending[dict[str, NDArray[Any]]]:
        """Queue a step; see `Backend.enqueue`. Two can be under way; a third one first waits for the oldest.

        Raises:
            DeviceError: TensorRT or CUDA failed; the states are those before the step.
        """
        turn = self._begin()
        self._queue(turn, inputs, idle)
        turn.download(self._downloads)
        turn.pending = Pending(lambda: self._collect(turn, turn.outputs))
        self._parity = 1 - turn.parity
        return turn.pending

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """Queue a step; see `Backend.step_on_device`.

        Raises:
            DeviceError: as for `enqueue`.
        """
        turn = self._begin()
        self._queue(turn, inputs, ())
        turn.finished.record(self._compute)
        turn.pending = Pending(lambda: self._collect(turn, {}))
        self._parity = 1 - turn.parity
        return {
            name: DeviceArray(
                data.device.address,
                data.host.array.shape,
                data.host.array.dtype,
                self._index,
                stream=self._compute.handle,
                ready=turn.computed,
                owner=self,
            )
            for name, data in turn.outputs.items()
        }

    def _begin(self) -> Turn:
        """The next step's turn, once the step before the last, which nobody may have waited for, is done with it."""
        cuda.use_device(self._index)
        turn = self._turns[self._parity]
        if turn.pending is not None:
            turn.pending.wait()
        return turn

    def _queue(self, turn: Turn, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int]) -> None:
        """Queue all of a step but its download. Where this fails half-way, what was queued only writes
        what the next step writes again: the parity stays.
        """
        turn.upload(inputs, self._uploads)
        self._compute.wait(turn.uploaded)
        turn.began.record(self._compute)
        if turn.graph is None:
            self._execute(turn)
        else:
            turn.graph.launch(self._compute)
        if idle:
            for state in self._states.values():
                state.keep(turn.parity, idle)
        turn.computed.record(self._compute)

    def _collect(self, turn: Turn, outputs: Mapping[str, Data]) -> dict[str, NDArray[Any]]:
        """Wait for a turn's step; copies of its outputs."""
        cuda.use_device(self._index)
        turn.pending = None
        try:
            turn.release()
        except DeviceError:
            if self._parity != turn.parity:  # no later step has read what this one wrote
                self._parity = turn.parity
            raise
        return {name: data.host.array.copy() for name, data in outputs.items()}

    def step_milliseconds(self) -> dict[str, float]:
        """Time on the GPU of the last step, which is done: "copy_in", "compute", "copy_out"."""
        return self._turns[1 - self._parity].milliseconds()

    def reset(self, slots: Sequence[bool] | None = None) -> None:
        """All states to their initial value, or the rows of their batch axis that are True and no others."""
        cuda.use_device(self._index)
        for state in self._states.values():
            state.reset(self._parity, slots)

    def read_state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state on the host, behind all steps that were begun."""
        cuda.use_device(self._index)
        arrays = {name: state.read(self._parity) for name, state in self._states.items()}
        self._compute.synchronize()
        return arrays

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace every state; names, dtypes and shapes are the contract's."""
        cuda.use_device(self._index)
        for name, own in self._states.items():
            own.write(self._parity, state[name])

    def close(self) -> None:
        """Free everything on the device. Calling it twice is allowed."""
        if self._engine is None:
            return
        cuda.use_device(self._index)
        self._free_buffers()
        self._context = self._cache = self._engine = self._runtime = None  # in this order: each needs the next
        for stream in (self._uploads, self._compute, self._downloads):
            stream.close()

    def _own(self, resource: Any) -> Any:
        self._buffers.callback(resource.close)
        return resource

    def _free_buffers(self) -> None:
        for turn in self._turns:
            if turn.pending is not None:
                with contextlib.suppress(StepcellError):  # it is raised where the step is waited for
                    turn.pending.wait()
        self._turns, self._states, self._parity = (), {}, 0
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
