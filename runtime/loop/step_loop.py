"""StepLoop: frames in, outputs out; the states stay where they are."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, StateError, StepcellError, UsageError
from stepcell.runtime.backends.base import Backend, Device, StepFuture
from stepcell.runtime.cuda import DeviceArray, OnDevice, is_on_device, read_device_array
from stepcell.runtime.loop.inputs import as_input, require_finite
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.open_backend import open_backend
from stepcell.runtime.loop.slots import Slot, SlotTable
from stepcell.runtime.loop.snapshot import Snapshot, contract_hash, read_snapshot, write_snapshot
from stepcell.runtime.loop.states import as_flags, as_states, forget_rows, require_shapes

__all__ = ["StepLoop"]


class StepLoop:
    """Steps a recurrent model; made by `StepLoop.open`, best in a `with` statement.

    Opened without `slots`, all rows of the batch step together: `step(x=batch)`. With `slots=N`
    streams come and go as rows of one batch: `attach`, `step_slots`, `detach`.

    The first step fixes the sizes (batch, height, width, ...); `reset()` frees them. A call that
    raises leaves the states as they were. A loop serves one thread at a time.

    Attributes:
        contract: names, shapes and dtypes of what the model takes, returns and remembers, as it
            runs here: a float16 model in its float32 form on a CPU says float32.
        name: the file, for messages.
        statistics: latency of steps, from the call to its outputs: for `step_async` until the end
            of `result`; `step_on_device`, which does not wait, is not counted.
    """

    def __init__(
        self, backend: Backend, *, name: str = "model", slots: int | None = None, check_finite: bool = True
    ) -> None:
        self._backend = backend
        self.name = name
        self._check_finite = check_finite
        self._inputs = {spec.name: spec for spec in backend.contract.inputs}
        self._slots = None if slots is None else SlotTable(backend.contract, slots)
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the inputs, once fixed
        self._usual: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = []  # the same with dtypes, for `step`
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
        slots: int | None = None,
        allow_fallback: bool = False,
        keep_float16: bool = False,
        threads: int | None = None,
        check_finite: bool = True,
    ) -> StepLoop:
        """Load a model.

        Args:
            path: `.onnx` runs in ONNX Runtime; `.engine`, `.plan` and `.trt` in TensorRT.
            device: "cpu", "cuda" or "cuda:N". It is used, or the call fails.
            slots: how many streams at most share the batch, each with a memory of its own.
            allow_fallback: use the CPU where CUDA does not load, and log it (ONNX files only).
            keep_float16: run a float16 ONNX file in float16 on the CPU too, which is slower.
            threads: for one step of an ONNX file on the CPU; None: one per core.
            check_finite: refuse inputs with NaN or Inf, which a state would remember for ever.

        Raises:
            UsageError: an unknown device or kind of file, or a model whose batch cannot be slots.
            InputError: the file cannot be read or is not a model.
            ContractError: the file has no contract, or one that does not fit its graph.
            DeviceError: the device is absent or does not load, or an engine was asked to run on the CPU.
            EngineMismatchError: the engine does not fit its sidecar, this TensorRT or this device.
            MissingDependencyError: ONNX Runtime or TensorRT is not installed.
        """
        backend = open_backend(
            Path(path), device, allow_fallback=allow_fallback, keep_float16=keep_float16, threads=threads
        )
        try:
            return cls(backend, name=str(path), slots=slots, check_finite=check_finite)
        except UsageError:
            backend.close()
            raise

    @property
    def device(self) -> str:
        """What really runs: "cpu" or "cuda:N"."""
        return self._backend.device

    @property
    def description(self) -> str:
        """Back end, version and device, for people."""
        return self._backend.description

    @property
    def slots(self) -> dict[str, Slot]:
        """The attached slots by name; empty for a loop without slots."""
        return {} if self._slots is None else self._slots.attached

    def step(self, /, **inputs: ArrayLike | OnDevice) -> dict[str, NDArray[Any]]:
        """One step of the whole batch: data inputs by name in, data outputs by name out.

        Args:
            inputs: numpy arrays, or anything numpy reads without a copy (`__array__`, DLPack on
                the CPU). Floats are cast to the contract's dtype; integers are refused for a
                float input, since nobody but the caller knows their scale. On a GPU also arrays
                that are on it (DLPack, `__cuda_array_interface__`), of the contract's dtype: they
                are never on the host, so they are not looked at for NaN.

        Returns:
            Arrays of the contract's dtypes. They are the caller's: no later step changes them.

        Raises:
            InputError: a name, shape, dtype or value that does not fit.
            UsageError: the loop has slots.
            DeviceError: the device failed or ran out of memory.
        """
        started = time.perf_counter()
        outputs = self._backend.step(self._checked(inputs))
        self.statistics.add(time.perf_counter() - started)
        return outputs

    def step_async(self, /, **inputs: ArrayLike | OnDevice) -> StepFuture[dict[str, NDArray[Any]]]:
        """Begin a step: arguments and errors of `step`, whose outputs `result()` of the future returns.

        With TensorRT the next frame is uploaded, and the last outputs are downloaded, while this
        step is computed. Two steps are under way at most: a third call first waits for the oldest
        one, whose outputs are kept for whoever waits for it later. In ONNX Runtime the whole step
        runs in this call.

        Steps run in the order of the calls, whatever is waited for first, and `state`, `reset` and
        all other methods see the states after the last one that was begun. Arrays on the host may
        be written to again when this returns, arrays on the GPU when `result` does. An error of the
        device comes out of `result`; if no later step was begun, the states are those before the step.
        """
        started = time.perf_counter()
        running = self._backend.enqueue(self._checked(inputs))
        return StepFuture(lambda: self._counted(running.result(), started))

    def step_on_device(self, /, **inputs: ArrayLike | OnDevice) -> dict[str, DeviceArray]:
        """`step` with outputs that stay on the GPU, for what reads them there by DLPack or `__cuda_array_interface__`.

        It returns at once, before they are computed; a reader that follows either protocol waits
        on its own stream (`torch.from_dlpack` and `cupy.from_dlpack` do). They are good until the
        step after the next begins, `reset()` or `close()`: by then all work that reads them must
        be done.

        Raises:
            UsageError: the loop has slots, or runs in ONNX Runtime.
            InputError, DeviceError: as for `step`.
        """
        return self._backend.step_on_device(self._checked(inputs))

    def attach(self, name: str | None = None) -> Slot:
        """A free slot, its states at their initial value.

        Args:
            name: of the stream, for messages, reports and snapshots; by default the row's number.

        Raises:
            StateError: all slots are in use, or the name is taken.
            UsageError: the loop has no slots.
        """
        slot = self._table().attach(name)
        self._reset_rows(self._table().mask([slot]))
        return slot

    def detach(self, slot: Slot) -> None:
        """Free a slot; from now on it is refused everywhere.

        Raises:
            StateError: it is not attached.
        """
        self._table().detach(slot)

    def step_slots(self, frames: Mapping[Slot, Mapping[str, ArrayLike]]) -> dict[Slot, dict[str, NDArray[Any]]]:
        """One step of the slots that have a frame; the others keep their states, bit by bit.

        The whole batch is computed, whatever the number of frames.

        Args:
            frames: for each slot its inputs by name, as `step` takes them, with a batch of one.

        Returns:
            For each of them its outputs, with a batch of one; the caller's.

        Raises:
            InputError: as for `step`, with the slot's name; no slot has stepped then.
            StateError: a slot is not attached.
            UsageError: the loop has no slots.
            DeviceError: the device failed or ran out of memory.
        """
        return self.step_slots_async(frames).result()

    def step_slots_async(
        self, frames: Mapping[Slot, Mapping[str, ArrayLike]]
    ) -> StepFuture[dict[Slot, dict[str, NDArray[Any]]]]:
        """`step_slots` in two halves, as `step_async` is `step`."""
        table = self._table()
        table.require(frames)
        if not frames:
            return StepFuture(dict)
        started = time.perf_counter()
        arrays = {slot: self._slot_arrays(slot, inputs) for slot, inputs in frames.items()}
        batch = table.pack(arrays)
        if self._check_finite:
            self._require_finite(batch, arrays)
        shapes = {name: array.shape for name, array in batch.items()}
        if shapes != self._shapes:
            self._fix_sizes(shapes)
        running = self._backend.enqueue(batch, table.idle(frames))
        slots = list(frames)
        return StepFuture(lambda: table.unpack(self._counted(running.result(), started), slots))

    def reset(self, slots: Sequence[bool] | Collection[Slot] | None = None) -> None:
        """Forget: states to their initial value, assigned, so that NaN is cleared too.

        Args:
            slots: which; the others keep their states, bit by bit. A loop with slots takes `Slot`s,
                one without a boolean for each row of the batch. None: all of them, and the sizes
                are free again.

        Raises:
            InputError: not one boolean per row of the batch.
            StateError: booleans before the first step, when the sizes are not known; a slot that
                is not attached.
        """
        self._require_open()
        if slots is None:
            self._shapes, self._pending, self._usual = None, None, []
        elif self._slots is not None:
            chosen: list[Any] = list(slots)
            self._slots.require(chosen)
            self._reset_rows(self._slots.mask(chosen))
        else:
            self._require_sizes()
            self._reset_rows(as_flags(slots, self.contract, self._state_shapes()))

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
        arrays = as_states(self.contract, state, None if self._slots is None else self._slots.count)
        if self._shapes is None:
            self._pending = arrays
        else:
            self._write(arrays)

    def save(self, path: str | Path, *, frame: int = 0, metadata: Mapping[str, str] | None = None) -> None:
        """Write all states and the slots' names to a file that `restore` goes on from.

        Args:
            path: a .safetensors file; it is replaced as a whole or not at all.
            frame: frames stepped so far, or whatever number the caller goes on from.
            metadata: the caller's own, to be found again in what `restore` returns.

        Raises:
            StateError: before the first step, when the states have no size.
            OutputError: the file cannot be written.
        """
        states = self.state()
        snapshot = Snapshot(
            contract_hash=contract_hash(self.contract),
            frame=frame,
            slots=None if self._slots is None else {name: slot.index for name, slot in self.slots.items()},
            rows=None if self._slots is None else self._slots.count,
            metadata=dict(metadata or {}),
        )
        write_snapshot(Path(path), states, snapshot)

    def restore(self, path: str | Path) -> Snapshot:
        """Go on from a snapshot of this model, taken on whatever back end; also before the first step.

        The slots that were attached are attached again, and no others: `slots` has them by name. A
        slot that is attached in the same row under the same name stays good.

        Raises:
            InputError: the file cannot be read, is damaged or is no snapshot.
            StateError: it belongs to another model, another number of slots or, as `load_state`
                says, other sizes.
        """
        self._require_open()
        states, snapshot = read_snapshot(Path(path), self.contract)
        rows = None if self._slots is None else self._slots.count
        if snapshot.rows != rows:
            wanted, got = (f"slots={count}" if count else "no slots" for count in (snapshot.rows, rows))
            raise StateError(f"{path}: taken of a loop with {wanted}, this one has {got}")
        self.load_state(states)
        if self._slots is not None:
            self._slots.replace(snapshot.slots or {})
        return snapshot

    def close(self) -> None:
        """Free the model; calling it twice is allowed."""
        if not self._closed:
            self._closed, self._usual = True, []
            self._backend.close()

    def __enter__(self) -> StepLoop:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _table(self) -> SlotTable:
        self._require_open()
        if self._slots is None:
            raise UsageError(f"{self.name}: opened without slots", hint="StepLoop.open(..., slots=N)")
        return self._slots

    def _checked(self, inputs: Mapping[str, ArrayLike | OnDevice]) -> Mapping[str, NDArray[Any] | DeviceArray]:
        """The inputs of a step of the whole batch, which the sizes are fixed by."""
        if self._are_usual(inputs):
            if self._check_finite:
                for name, usual in inputs.items():
                    require_finite(name, usual)
            return inputs
        self._require_open()
        if self._slots is not None:
            raise UsageError(f"{self.name}: opened with slots, which are stepped by step_slots({{slot: inputs}})")
        self._require_names(inputs)
        arrays = {name: self._array(spec, inputs[name]) for name, spec in self._inputs.items()}
        if self._check_finite:
            for name, array in arrays.items():
                if not isinstance(array, DeviceArray):
                    require_finite(name, array)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._shapes:
            self._fix_sizes(shapes)
        return arrays

    def _are_usual(self, inputs: Mapping[str, Any]) -> TypeGuard[Mapping[str, NDArray[Any]]]:
        """Whether these are arrays as the model takes them, of the sizes that are fixed: nearly always.

        All other checks are passed then. Between two steps every instruction is cold, so fewer are quicker.
        """
        if len(inputs) != len(self._usual):
            return False
        for name, shape, dtype in self._usual:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.shape != shape or array.dtype != dtype:
                return False
            if not array.flags.c_contiguous:
                return False
        return bool(self._usual)

    def _array(self, spec: TensorSpec, value: Any) -> NDArray[Any] | DeviceArray:
        if type(value) is np.ndarray or not is_on_device(value):
            return as_input(spec, value)
        stream = self._backend.input_stream
        if stream is None:
            raise InputError(
                f"{spec.name}: expected an array on the CPU, where the model runs, got one on a GPU",
                hint="x.cpu(), or open the model on the GPU: StepLoop.open(..., device='cuda')",
            )
        return read_device_array(spec, value, stream=stream, device=Device.parse(self.device).index)

    def _counted(self, outputs: dict[str, NDArray[Any]], started: float) -> dict[str, NDArray[Any]]:
        self.statistics.add(time.perf_counter() - started)
        return outputs

    def _slot_arrays(self, slot: Slot, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        try:
            self._require_names(inputs)
            return {name: as_input(spec, inputs[name]) for name, spec in self._inputs.items()}
        except InputError as error:
            raise InputError(f"slot {slot.name}: {error.message}", hint=error.hint) from error

    def _require_finite(self, batch: Mapping[str, NDArray[Any]], frames: Mapping[Slot, Any]) -> None:
        """One look at the whole batch; only where that fails one at each slot, for its name."""
        try:
            for name, array in batch.items():
                require_finite(name, array)
        except InputError:
            for slot, arrays in frames.items():
                for name, array in arrays.items():
                    require_finite(f"slot {slot.name}: {name}", array)

    def _reset_rows(self, rows: Sequence[bool]) -> None:
        if self._shapes is not None:
            self._backend.reset(rows)
        elif self._pending is not None:  # without either, the first step starts from the initial values
            forget_rows(self.contract, self._pending, rows)

    def _require_names(self, inputs: Mapping[str, Any]) -> None:
        if inputs.keys() != self._inputs.keys():
            raise InputError(f"step: expected inputs {', '.join(self._inputs)}, got {', '.join(inputs) or 'none'}")

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
        if self._slots is None:
            self._usual = [(name, shapes[name], np.dtype(spec.dtype)) for name, spec in self._inputs.items()]

    def _write(self, arrays: dict[str, NDArray[Any]]) -> None:
        require_shapes(arrays, self._state_shapes())
        self._backend.write_state(arrays)

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.contract.state_shapes(self._symbols or {})

    def _require_open(self) -> None:
        if self._closed:
            raise StepcellError(f"{self.name}: this loop is closed", hint="open the model again: StepLoop.open(...)")

    def _require_sizes(self) -> None:
        if self._shapes is None:
            raise StateError(f"{self.name}: no step has run yet, so the states have no size")
