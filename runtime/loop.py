"""StepLoop: frames in, outputs out; the states stay where they are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.console import log
from stepcell.contract import StateSpec, StepContract
from stepcell.errors import DeviceError, InputError, StateError, StepcellError, UsageError
from stepcell.runtime.backend import Backend, Device
from stepcell.runtime.inputs import as_input, require_finite
from stepcell.runtime.statistics import Latency

__all__ = ["StepLoop"]

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


class StepLoop:
    """Steps a recurrent model; made by `StepLoop.open`, best in a `with` statement.

    The first step fixes the sizes (batch, height, width, ...); `reset()` frees them. A call that
    raises leaves the states as they were. A loop serves one thread at a time.

    Attributes:
        contract: names, shapes and dtypes of what the model takes, returns and remembers, as it
            runs here: a float16 model in its float32 form on a CPU says float32.
        name: the file, for messages.
        statistics: latency of `step`, from call to return.
    """

    def __init__(self, backend: Backend, *, name: str = "model", check_finite: bool = True) -> None:
        self._backend = backend
        self.name = name
        self._check_finite = check_finite
        self._inputs = {spec.name: spec for spec in backend.contract.inputs}
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the inputs, once fixed
        self._symbols: dict[str, int] | None = None  # what the back end's buffers are made for
        self._pending: dict[str, NDArray[Any]] | None = None  # a state loaded before the first step
        self._closed = False
        self.contract: StepContract = backend.contract
        self.statistics = Latency()

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "cpu",
        *,
        allow_fallback: bool = False,
        keep_float16: bool = False,
        threads: int | None = None,
        check_finite: bool = True,
    ) -> StepLoop:
        """Load a model.

        Args:
            path: `.onnx` runs in ONNX Runtime; `.engine`, `.plan` and `.trt` in TensorRT.
            device: "cpu", "cuda" or "cuda:N". It is used, or the call fails.
            allow_fallback: use the CPU where CUDA does not load, and log it (ONNX files only).
            keep_float16: run a float16 ONNX file in float16 on the CPU too, which is slower.
            threads: for one step of an ONNX file on the CPU; None: one per core.
            check_finite: refuse inputs with NaN or Inf, which a state would remember for ever.

        Raises:
            UsageError: an unknown device or kind of file.
            InputError: the file cannot be read or is not a model.
            ContractError: the file has no contract, or one that does not fit its graph.
            DeviceError: the device is absent or does not load, or an engine was asked to run on the CPU.
            EngineMismatchError: the engine does not fit its sidecar, this TensorRT or this device.
            MissingDependencyError: ONNX Runtime or TensorRT is not installed.
        """
        path, place = Path(path), Device.parse(device)
        if path.suffix in ENGINE_SUFFIXES:
            backend = _open_engine(path, place)
        elif path.suffix == ".onnx":
            backend = _open_onnx(path, place, allow_fallback, keep_float16, threads)
        else:
            kinds = ", ".join((".onnx", *ENGINE_SUFFIXES))
            raise UsageError(f"{path}: expected a model file ({kinds}), got suffix {path.suffix!r}")
        return cls(backend, name=str(path), check_finite=check_finite)

    @property
    def device(self) -> str:
        """What really runs: "cpu" or "cuda:N"."""
        return self._backend.device

    @property
    def description(self) -> str:
        """Back end, version and device, for people."""
        return self._backend.description

    def step(self, /, **inputs: ArrayLike) -> dict[str, NDArray[Any]]:
        """One step: data inputs by name in, data outputs by name out.

        Args:
            inputs: numpy arrays, or anything numpy reads without a copy (`__array__`, DLPack on
                the CPU). Floats are cast to the contract's dtype; integers are refused for a
                float input, since nobody but the caller knows their scale.

        Returns:
            Arrays of the contract's dtypes. They are the caller's: no later step changes them.

        Raises:
            InputError: a name, shape, dtype or value that does not fit.
            DeviceError: the device failed or ran out of memory.
        """
        self._require_open()
        started = time.perf_counter()
        arrays = self._arrays(inputs)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._shapes:
            self._fix_sizes(shapes)
        outputs = self._backend.step(arrays)
        self.statistics.add(time.perf_counter() - started)
        return outputs

    def reset(self, slots: Sequence[bool] | None = None) -> None:
        """Forget.

        Args:
            slots: for each row of the batch whether to set its states to their initial value; the
                others keep theirs, bit by bit. None: all of them, and the sizes are free again.

        Raises:
            InputError: not one boolean per row of the batch.
            StateError: `slots` before the first step, when the sizes are not known.
        """
        self._require_open()
        if slots is None:
            self._shapes, self._pending = None, None
            return
        self._require_sizes()
        rows = {shape[spec.batch_axis] for spec, shape in self._states()}
        flags = np.asarray(slots)
        if flags.dtype != bool or flags.ndim != 1 or (rows and {len(flags)} != rows):
            raise InputError(
                f"slots: expected {max(rows, default=1)} booleans, one per row of the batch, got {slots!r}"
            )
        self._backend.reset(flags.tolist())

    def state(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name.

        Raises:
            StateError: before the first step, when the sizes are not known.
        """
        self._require_open()
        self._require_sizes()
        return self._backend.read_state()

    def load_state(self, state: Mapping[str, ArrayLike]) -> None:
        """Replace every state, such as by what `state()` returned; also before the first step.

        Raises:
            StateError: a name is missing or unknown, or an array has another shape or is not of
                floats. Before the first step the sizes are not known: that step compares them.
        """
        self._require_open()
        names = [spec.name for spec in self.contract.states]
        if set(state) != set(names):
            raise StateError(
                f"states: expected {', '.join(names) or 'none'}, got {', '.join(map(str, state)) or 'none'}",
                hint="the snapshot belongs to another model" if state else None,
            )
        arrays = {}
        for spec in self.contract.states:
            array = np.array(state[spec.name])
            if array.dtype.kind != np.dtype(spec.dtype).kind or array.ndim != len(spec.shape):
                raise StateError(
                    f"{spec.name}: expected {spec.dtype} of shape {spec.shape}, got {array.dtype} {array.shape}"
                )
            arrays[spec.name] = np.ascontiguousarray(array, spec.dtype)
        if self._shapes is None:
            self._pending = arrays
        else:
            self._write(arrays)

    def close(self) -> None:
        """Free the model; calling it twice is allowed."""
        if not self._closed:
            self._closed = True
            self._backend.close()

    def __enter__(self) -> StepLoop:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _arrays(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        if inputs.keys() != self._inputs.keys():
            raise InputError(f"step: expected inputs {', '.join(self._inputs)}, got {', '.join(inputs) or 'none'}")
        arrays = {name: as_input(spec, inputs[name]) for name, spec in self._inputs.items()}
        if self._check_finite:
            for name, array in arrays.items():
                require_finite(name, array)
        return arrays

    def _fix_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if self._shapes is not None:
            name = next(name for name in shapes if shapes[name] != self._shapes[name])
            raise InputError(
                f"{name}: expected shape {self._shapes[name]} as in the first step, got {shapes[name]}",
                hint="reset() forgets the states and frees the sizes",
            )
        symbols = self.contract.bind(shapes)
        if symbols == self._symbols:
            self._backend.reset()
        else:
            self._symbols = None
            self._backend.configure(symbols)
            self._symbols = symbols
        if self._pending is not None:
            self._write(self._pending)
            self._pending = None
        self._shapes = shapes

    def _write(self, arrays: dict[str, NDArray[Any]]) -> None:
        for spec, shape in self._states():
            if arrays[spec.name].shape != shape:
                raise StateError(
                    f"{spec.name}: expected shape {shape} for these inputs, got {arrays[spec.name].shape}",
                    hint="a state belongs to one frame size; reset() forgets it",
                )
        self._backend.write_state(arrays)

    def _states(self) -> list[tuple[StateSpec, tuple[int, ...]]]:
        shapes = self.contract.state_shapes(self._symbols or {})
        return [(spec, shapes[spec.name]) for spec in self.contract.states]

    def _require_open(self) -> None:
        if self._closed:
            raise StepcellError(f"{self.name}: this loop is closed", hint="open the model again: StepLoop.open(...)")

    def _require_sizes(self) -> None:
        if self._shapes is None:
            raise StateError(f"{self.name}: no step has run yet, so the states have no size")


def _open_onnx(path: Path, device: Device, allow_fallback: bool, keep_float16: bool, threads: int | None) -> Backend:
    from stepcell.runtime.ort import OrtBackend

    try:
        return OrtBackend(path, device, keep_float16=keep_float16, threads=threads)
    except DeviceError as error:
        if device.kind == "cpu" or not allow_fallback:
            raise
        log(f"{error.message}: running on the CPU instead, as allowed")
    return OrtBackend(path, Device("cpu"), keep_float16=keep_float16, threads=threads)


def _open_engine(path: Path, device: Device) -> Backend:
    if device.kind == "cpu":
        raise DeviceError(
            f"{path}: a TensorRT engine runs on a GPU only, and the device asked for is the CPU",
            hint="--device cuda, or run the .onnx file that the engine was built from",
        )
    from stepcell.runtime.tensorrt import TensorRTBackend

    backend: Backend = TensorRTBackend(path, device)
    return backend
