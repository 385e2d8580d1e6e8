"""ONNX Runtime back end: runs an ONNX file on the CPU or with CUDA.

Every state has two buffers, and two IO bindings are made once the sizes are known: one reads the first buffers and
writes the second, the other the reverse. Steps use them alternately, so a state is never copied, and with CUDA it never
leaves the device. Only idle rows are copied, from the buffer that was read to the one that was written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StateSpec, StepContract
from stepcell.dims import resolve
from stepcell.errors import StepcellError, UsageError
from stepcell.library_errors import as_stepcell_error
from stepcell.limits import FIRST_STEP_SECONDS, within_seconds
from stepcell.optional_imports import require
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device, Spin, StepFuture
from stepcell.runtime.backends.onnxruntime.session import captures_graphs, open_session
from stepcell.runtime.cuda import DeviceArray

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OrtBackend"]

# From this size in bytes on, an output gets new memory at each step instead of a copy: binding takes 3 us for any size,
# a copy 3 us for 128 kB and 23 us for 0.9 MB, or more if the data is not in the cache.
_LARGE_OUTPUT = 1 << 19
# Up to this size in bytes, copying an input takes less time than binding the array of the step.
_SMALL_INPUT = 1 << 15


class OrtBackend:
    """A `Backend` for ONNX files.

    Args:
        path: an ONNX file with a contract.
        device: CPU or GPU.
        keep_float16: on the CPU, run a float16 model in float16 instead of float32.
        threads: number of threads for one step on the CPU; None: one per core.
        spin: threads spin while they wait for work, rather than sleep; "in step": not between two steps.
        check_file: refuse a file that has changed since its export.

    Raises:
        InputError: the file cannot be read or is not an ONNX model.
        ContractError: it has no contract, or one that does not fit its graph.
        DeviceError: the CUDA provider was requested and does not load.
        MissingDependencyError: onnxruntime is not installed.
    """

    overlaps = False
    skips_idle = False

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        keep_float16: bool = False,
        threads: int | None = None,
        spin: Spin = True,
        check_file: bool = True,
    ) -> None:
        self._path = path
        self._device = device
        self._ort: Any = require("onnxruntime", extra="ort", purpose="running a model")
        session, contract, specialized = open_session(
            path, device, keep_float16=keep_float16, threads=threads, spin=spin, check_file=check_file
        )
        self._session: Any = session
        self._specialized = specialized
        self.contract: StepContract = contract
        self.device = str(device)
        kind = "CPU" if device.kind == "cpu" else f"CUDA device {device.index}"
        self.description = f"ONNX Runtime {self._ort.__version__}, {kind}, {self.contract.precision}"
        self._inputs: dict[str, _Buffer] = {}
        self._outputs: dict[str, _Buffer] = {}
        self._states: dict[str, tuple[_Buffer, _Buffer]] = {}
        self._ordered = [spec.name for spec in contract.outputs]
        self._large: dict[str, tuple[tuple[int, ...], str]] = {}
        self._bindings: tuple[Any, ...] = ()
        self._bound: tuple[dict[str, NDArray[Any]], ...] = ()  # host arrays that are bound as inputs, per binding
        self._parity = 0  # index of the buffer that holds the current state
        self._stream: cuda.Stream | None = None  # for copies on CUDA
        self._captures = device.kind == "cuda" and captures_graphs(session)
        self._has_run = False  # a step, since it was configured
        self._graphs = 0  # number of CUDA graphs so far; each binding has its own
        self._options: tuple[Any, ...] = ()  # run options, per binding

    def simplified(self, symbols: Mapping[str, int]) -> ModelProto | None:
        """The model as it runs on the CPU, with functions inlined, sizes filled in and constants folded.

        Returns:
            A new model; None: this one is not specialised for its sizes.
        """
        shapes = {name: resolve(spec.shape, symbols) for name, spec in self.contract.graph_inputs.items()}
        return None if self._specialized is None else self._specialized.simplified(shapes)

    @property
    def input_stream(self) -> int | None:
        """Handle of the CUDA stream that copies inputs from device memory; None on the CPU."""
        return self._copy_stream().handle if self._device.kind == "cuda" else None

    def configure(self, symbols: Mapping[str, int]) -> None:
        contract = self.contract
        self._free()
        self._has_run = False
        try:
            if self._specialized is not None:
                self._session = self._specialized.session(
                    {name: resolve(spec.shape, symbols) for name, spec in contract.graph_inputs.items()}
                )
            inputs = [spec for spec in contract.inputs if self._has_buffer(spec, symbols)]
            self._inputs = {spec.name: self._buffer(spec, symbols) for spec in inputs}
            self._large = self._large_outputs(symbols)
            small = [spec for spec in contract.outputs if spec.name not in self._large]
            self._outputs = {spec.name: self._buffer(spec, symbols) for spec in small}
            self._states = {
                spec.name: (self._buffer(spec, symbols), self._buffer(spec, symbols)) for spec in contract.states
            }
            self._bindings, self._bound = (self._bind(0), self._bind(1)), ({}, {})
            self._options = (self._run_options(), self._run_options())
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise self._failure("its buffers cannot be made", error) from error
        self.reset()

    def step(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> dict[str, NDArray[Any]]:
        binding = self._bindings[self._parity]
        try:
            if self._device.kind == "cuda":
                outputs = self._run_on_device(binding, inputs)
            else:
                outputs = self._run_on_host(binding, inputs)
            if idle:
                self._keep(idle)
        except Exception as error:
            for options in self._options:
                options.terminate = False
            raise self._failure("the step failed", error) from error
        self._parity ^= 1
        return outputs

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        """Run the whole step in this call: ONNX Runtime cannot run an IO binding in the background."""
        outputs = self.step(inputs, idle)
        return StepFuture(lambda: outputs)

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """Not supported: raises UsageError."""
        raise UsageError(
            f"{self._path}: ONNX Runtime returns its outputs on the host",
            hint="use step(), or build an engine: `stepcell build`",
        )

    def _run_on_host(self, binding: Any, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        bound = self._bound[self._parity]
        for name, array in inputs.items():
            if (buffer := self._inputs.get(name)) is not None:
                buffer.host[...] = array
            elif bound.get(name) is not array:  # a stream reuses one array for its frames
                binding.bind_cpu_input(name, array)
                bound[name] = array
        outputs: dict[str, NDArray[Any]] = {}
        for name, (shape, dtype) in self._large.items():
            outputs[name] = np.empty(shape, dtype)
            binding.bind_ortvalue_output(
                name, self._ort.OrtValue.ortvalue_from_numpy(outputs[name])
            )  # shares its memory
        self._run(binding)
        for name, output in self._outputs.items():
            outputs[name] = output.host.copy()
        return outputs if len(self._ordered) == 1 else {name: outputs[name] for name in self._ordered}

    def _run(self, binding: Any) -> None:
        """Run on the CPU; the first step within the limit, since a loop in the graph may never end."""
        run = functools.partial(self._session.run_with_iobinding, binding, self._options[self._parity])
        if self._has_run:
            run()
        else:
            within_seconds(FIRST_STEP_SECONDS, run, f"{self._path}: the first step", stop=self.interrupt)
            self._has_run = True

    def _has_buffer(self, spec: Spec, symbols: Mapping[str, int]) -> bool:
        """Whether an input is copied to a buffer. On the CPU, a large input is bound in the caller's memory instead."""
        nbytes = math.prod(resolve(spec.shape, symbols)) * np.dtype(spec.dtype).itemsize
        return self._device.kind == "cuda" or nbytes <= _SMALL_INPUT

    def _large_outputs(self, symbols: Mapping[str, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the outputs that get new memory at each step instead of a copy."""
        if self._device.kind == "cuda":
            return {}
        shapes = {spec.name: (resolve(spec.shape, symbols), spec.dtype) for spec in self.contract.outputs}
        return {
            name: (shape, dtype)
            for name, (shape, dtype) in shapes.items()
            if math.prod(shape) * np.dtype(dtype).itemsize >= _LARGE_OUTPUT
        }

    def _run_on_device(self, binding: Any, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, NDArray[Any]]:
        for name, buffer in self._inputs.items():
            value = inputs[name]
            if isinstance(value, DeviceArray):
                self._copy_in(buffer, value)
            else:
                buffer.write(value)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, self._options[self._parity])
        binding.synchronize_outputs()
        return {name: buffer.read() for name, buffer in self._outputs.items()}

    def interrupt(self) -> None:
        """Ask a step that runs in another thread to end; ONNX Runtime looks for that between two nodes."""
        for options in self._options:
            options.terminate = True

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        chosen = slice(None) if rows is None else np.flatnonzero(rows)
        for spec in self.contract.states:
            # Assign instead of multiplying by a mask: 0 * NaN is NaN.
            initial = spec.initial(self._states[spec.name][0].shape)
            index = (...,) if spec.batch_axis is None else (slice(None),) * spec.batch_axis + (chosen,)
            if spec.batch_axis is not None or rows is None or any(rows):
                self._states[spec.name][self._parity].assign(index, initial[index])

    def read_state(self) -> dict[str, NDArray[Any]]:
        return {name: pair[self._parity].read() for name, pair in self._states.items()}

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, pair in self._states.items():
            pair[self._parity].write(state[name])

    def read_row(self, row: int) -> dict[str, NDArray[Any]]:
        return {
            spec.name: self._states[spec.name][self._parity].read(_row_index(spec, row))
            for spec in self.contract.states
        }

    def write_row(self, row: int, state: Mapping[str, NDArray[Any]]) -> None:
        for spec in self.contract.states:
            self._states[spec.name][self._parity].assign(_row_index(spec, row), state[spec.name])

    def close(self) -> None:
        """Free all memory; `configure` opens a session again where the model is specialised for its sizes."""
        self._free()
        self._session = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _copy_in(self, buffer: _Buffer, value: DeviceArray) -> None:
        """Copy a device array into an input, and wait for the copy: ONNX Runtime computes on its own stream."""
        stream = self._copy_stream()
        if value.stream is not None:
            event = cuda.Event()
            event.record_on(value.stream)
            stream.wait(event)
            event.close()  # CUDA keeps it until the stream has passed it
        cuda.copy_on_device(buffer.value.data_ptr(), value.address, buffer.nbytes, stream)
        stream.synchronize()

    def _copy_stream(self) -> cuda.Stream:
        cuda.use_device(self._device.index)
        self._stream = self._stream or cuda.Stream()
        return self._stream

    def _run_options(self) -> Any:
        """Run options of a binding, with a CUDA graph of its own where they are used, captured in its first run.

        The run that captures a graph repeats the step, which is harmless: a step does not write what it reads.
        """
        options = self._ort.RunOptions()
        options.log_severity_level = 4  # errors are raised; its own lines on stderr would be second ones
        if self._captures:
            self._graphs += 1
            options.add_run_config_entry("gpu_graph_id", str(self._graphs))
        return options

    def _keep(self, idle: Sequence[int]) -> None:
        """Copy the states of idle rows from the buffers that the step has read to those that it has written."""
        stream = self._copy_stream() if self._device.kind == "cuda" else None
        for spec in self.contract.states:
            pair = self._states[spec.name]
            assert spec.batch_axis is not None or not idle  # slots need an axis of streams
            for row in idle:
                pair[1 - self._parity].copy_row(pair[self._parity], row, spec.batch_axis or 0, stream)
        if stream is not None:
            stream.synchronize()

    def _free(self) -> None:
        self._bindings, self._bound = (), ()
        self._inputs, self._outputs, self._states = {}, {}, {}

    def _buffer(self, spec: Spec, symbols: Mapping[str, int]) -> _Buffer:
        return _Buffer(self._ort, resolve(spec.shape, symbols), np.dtype(spec.dtype), self._device)

    def _bind(self, parity: int) -> Any:
        binding = self._session.io_binding()
        for name, buffer in self._inputs.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in self._outputs.items():
            binding.bind_ortvalue_output(name, buffer.value)
        for spec in self.contract.states:
            binding.bind_ortvalue_input(spec.input, self._states[spec.name][parity].value)
            binding.bind_ortvalue_output(spec.output, self._states[spec.name][1 - parity].value)
        return binding

    def _failure(self, what: str, error: Exception) -> StepcellError:
        return as_stepcell_error(error, str(self._path), what=f"{what} in ONNX Runtime on {self.device}")


def _row_index(spec: StateSpec, row: int) -> tuple[Any, ...]:
    """Index of a row of a state, whose axis is kept with size 1."""
    return (*(slice(None),) * (spec.batch_axis or 0), slice(row, row + 1))


class _Buffer:
    """A tensor at a fixed address: a numpy array shared with ONNX Runtime, or CUDA memory."""

    def __init__(self, ort: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> None:
        self.shape = shape
        self._itemsize = dtype.itemsize
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._on_host = device.kind == "cpu"
        if self._on_host:
            self.host: NDArray[Any] = np.zeros(shape, dtype)
            self.value = ort.OrtValue.ortvalue_from_numpy(self.host)
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, "cuda", device.index)

    def read(self, index: tuple[Any, ...] = ()) -> NDArray[Any]:
        """A copy on the host, of all or of a part."""
        copy: NDArray[Any] = (self.host if self._on_host else self.value.numpy())[index].copy()
        return copy

    def write(self, array: NDArray[Any]) -> None:
        if self._on_host:
            self.host[...] = array
        else:
            self.value.update_inplace(array)

    def assign(self, index: tuple[Any, ...], values: NDArray[Any]) -> None:
        """Replace a part. On CUDA this goes through the host, which is slow but rare."""
        if self._on_host:
            self.host[index] = values
        else:
            array = self.value.numpy()
            array[index] = values
            self.value.update_inplace(array)

    def copy_row(self, source: _Buffer, row: int, axis: int, stream: cuda.Stream | None) -> None:
        """Copy one index of one axis from a buffer of the same shape. On CUDA the copy is queued."""
        if stream is None:
            index = (slice(None),) * axis + (row,)
            self.host[index] = source.host[index]
        else:
            cuda.copy_row(self._rows(axis), row, source._rows(axis), row, stream)

    def _rows(self, axis: int) -> cuda.Rows:
        return cuda.Rows.of(self.value.data_ptr(), self.shape, axis, self._itemsize)
