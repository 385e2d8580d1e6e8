"""The ONNX Runtime back end: states bound to two buffers each, swapped at every step.

Two IO bindings are made when the sizes are known. One reads the states from the first buffers
and writes them to the second, the other the reverse; a step runs one of them and the next step
the other. So a state is never copied, and on CUDA it never leaves the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.dims import resolve
from stepcell.errors import DeviceError, StepcellError
from stepcell.missing import require
from stepcell.runtime.backend import Device
from stepcell.runtime.ort_session import open_session

__all__ = ["OrtBackend"]


class OrtBackend:
    """A `Backend` that runs a model in ONNX Runtime.

    Args:
        path: an ONNX file with a contract.
        device: where to run it.
        keep_float16: on the CPU, run a float16 model as it is instead of in its float32 form.
        threads: threads for one step on the CPU; None: as many as there are cores.

    Raises:
        InputError: the file cannot be read or is not an ONNX model.
        ContractError: it has no contract, or another one than its graph.
        DeviceError: CUDA was asked for and does not load.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, device: Device, *, keep_float16: bool = False, threads: int | None = None) -> None:
        self._path = path
        self._device = device
        self._ort: Any = require("onnxruntime", extra="ort", purpose="running a model")
        session, contract = open_session(path, device, keep_float16=keep_float16, threads=threads)
        self._session: Any = session
        self.contract: StepContract = contract
        self.device = str(device)
        kind = "CPU" if device.kind == "cpu" else f"CUDA device {device.index}"
        self.description = f"ONNX Runtime {self._ort.__version__}, {kind}, {self.contract.precision}"
        self._inputs: dict[str, _Buffer] = {}
        self._outputs: dict[str, _Buffer] = {}
        self._states: dict[str, tuple[_Buffer, _Buffer]] = {}
        self._bindings: tuple[Any, ...] = ()
        self._now = 0  # which buffer of each pair holds the present state

    def configure(self, symbols: Mapping[str, int]) -> None:
        contract = self.contract
        self._free()
        try:
            # On the CPU the caller's own array is bound as the input, without a copy.
            inputs = contract.inputs if self._device.kind == "cuda" else ()
            self._inputs = {spec.name: self._buffer(spec, symbols) for spec in inputs}
            self._outputs = {spec.name: self._buffer(spec, symbols) for spec in contract.outputs}
            self._states = {
                spec.name: (self._buffer(spec, symbols), self._buffer(spec, symbols)) for spec in contract.states
            }
            self._bindings = (self._bind(0), self._bind(1))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise self._failure("its buffers cannot be made", error) from error
        self.reset()

    def step(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        binding = self._bindings[self._now]
        try:
            if self._inputs:
                for name, buffer in self._inputs.items():
                    buffer.write(inputs[name])
                binding.synchronize_inputs()
            else:
                for name, array in inputs.items():
                    binding.bind_cpu_input(name, array)
            self._session.run_with_iobinding(binding)
            if self._inputs:
                binding.synchronize_outputs()
        except Exception as error:
            raise self._failure("the step failed", error) from error
        self._now ^= 1
        return {name: buffer.read() for name, buffer in self._outputs.items()}

    def reset(self, slots: Sequence[bool] | None = None) -> None:
        for spec in self.contract.states:
            buffer = self._states[spec.name][self._now]
            state = buffer.read()
            rows = slice(None) if slots is None else np.asarray(slots, bool)
            state[(slice(None),) * spec.batch_axis + (rows,)] = 0  # assigned, not multiplied: 0 * NaN is NaN
            buffer.write(state)

    def read_state(self) -> dict[str, NDArray[Any]]:
        return {name: pair[self._now].read() for name, pair in self._states.items()}

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, pair in self._states.items():
            pair[self._now].write(state[name])

    def close(self) -> None:
        self._free()
        self._session = None

    def _free(self) -> None:
        self._bindings = ()
        self._inputs, self._outputs, self._states = {}, {}, {}

    def _buffer(self, spec: Spec, symbols: Mapping[str, int]) -> _Buffer:
        return _Buffer(self._ort, resolve(spec.shape, symbols), np.dtype(spec.dtype), self._device)

    def _bind(self, now: int) -> Any:
        binding = self._session.io_binding()
        for name, buffer in self._inputs.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in self._outputs.items():
            binding.bind_ortvalue_output(name, buffer.value)
        for spec in self.contract.states:
            binding.bind_ortvalue_input(spec.input, self._states[spec.name][now].value)
            binding.bind_ortvalue_output(spec.output, self._states[spec.name][1 - now].value)
        return binding

    def _failure(self, what: str, error: Exception) -> StepcellError:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, MemoryError) or "allocate memory" in text.lower():
            return DeviceError(f"{self._path}: not enough memory on {self.device}: {text}", hint="use smaller frames")
        return StepcellError(f"{self._path}: {what} in ONNX Runtime: {text}")


class _Buffer:
    """A tensor at a fixed address: a numpy array that ONNX Runtime sees, or CUDA memory."""

    def __init__(self, ort: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> None:
        self._on_host = device.kind == "cpu"
        if self._on_host:
            self.host: NDArray[Any] = np.zeros(shape, dtype)
            self.value = ort.OrtValue.ortvalue_from_numpy(self.host)
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, "cuda", device.index)

    def read(self) -> NDArray[Any]:
        """A copy on the host."""
        copy: NDArray[Any] = self.host.copy() if self._on_host else self.value.numpy()
        return copy

    def write(self, array: NDArray[Any]) -> None:
        if self._on_host:
            np.copyto(self.host, array)
        else:
            self.value.update_inplace(array)
