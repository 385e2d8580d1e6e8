"""StepLoop: steps a recurrent model frame by frame and keeps its states."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike, NDArray

from stepcell.contract import StepContract
from stepcell.errors import StateError, StepcellError, UsageError
from stepcell.runtime.backends.base import Backend, Spin, StepFuture
from stepcell.runtime.cuda import DeviceArray, OnDevice
from stepcell.runtime.loop.inputs import StepInputs
from stepcell.runtime.loop.latency import Latency
from stepcell.runtime.loop.open_backend import open_backend
from stepcell.runtime.loop.slots import Slot, SlotTable
from stepcell.runtime.loop.snapshot import Snapshot, contract_hash, read_snapshot, write_snapshot
from stepcell.runtime.loop.states import LoopStates, as_states, stream_count

__all__ = ["StepLoop"]


class StepLoop:
    """A recurrent model that is stepped frame by frame. Use `StepLoop.open`, preferably in a `with` statement.

    Without `slots`, all rows of the batch step together: `step(x=batch)`. With `slots=N`, up to N streams share one
    batch and come and go: `attach`, `step_slots`, `detach`.

    The first step fixes the sizes (batch, height, width, ...), and `reset()` frees them. A call that raises an error
    leaves the states as they were. A loop must not be used by two threads at the same time.

    Attributes:
        contract: names, shapes and dtypes of inputs, outputs and states as the model runs here: a float16 model that
            runs in float32 on a CPU has a float32 contract.
        name: the file, for messages.
        latency: durations of the steps, each from the call until its outputs are there; for `step_async` until
            `result` returns. `step_on_device`, which does not wait, is not counted.
    """

    def __init__(
        self, backend: Backend, *, name: str = "model", slots: int | None = None, check_finite: bool = True
    ) -> None:
        self._backend = backend
        self.name = name
        self._inputs = StepInputs(backend, check_finite=check_finite)
        self._states = LoopStates(backend, name)
        self._slots = None if slots is None else SlotTable(backend.contract, slots)
        self._closed = False
        self.contract: StepContract = backend.contract
        self.latency: Latency = Latency()

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
        spin: Spin = True,
        check_finite: bool = True,
        check_file: bool = True,
        backend: str = "auto",
    ) -> StepLoop:
        """Load a model.

        Args:
            path: `.onnx` runs in ONNX Runtime, or in ncnn; `.engine`, `.plan` and `.trt` in TensorRT.
            device: "cpu", "cuda" or "cuda:N". There is no silent fallback to another device.
            slots: maximum number of streams that share the batch, each with states of its own.
            allow_fallback: use the CPU if CUDA does not load, and log it (ONNX files only).
            keep_float16: run a float16 ONNX file in float16 on the CPU too, which is slower.
            threads: number of threads for one step of an ONNX file on the CPU; None: one per core.
            spin: ONNX Runtime's threads spin while they wait for work, which takes a core from other threads and
                processes; "in step": only until the step ends; False: they sleep.
            check_finite: refuse inputs with NaN or Inf, which would stay in the states.
            check_file: refuse an ONNX file whose graph, weights or contract have changed since its export.
            backend: what computes an ONNX file on the CPU: "onnxruntime", "ncnn", or "auto", the faster of both if
                ncnn is installed and computes the model; they are compared and timed when the sizes are known, and
                the result is remembered. The environment variable STEPCELL_BACKEND says what "auto" stands for.

        Raises:
            UsageError: an unknown device, back end or kind of file, or a model whose batch cannot be divided into
                slots.
            InputError: the file cannot be read or is not a model.
            ContractError: the file has no contract, or one that does not fit its graph; or it has changed.
            DeviceError: the device is absent or does not load, or is the CPU for an engine.
            EngineMismatchError: the engine does not fit its sidecar, this TensorRT or this device.
            MissingDependencyError: ONNX Runtime or TensorRT is not installed.
        """
        opened = open_backend(
            Path(path),
            device,
            allow_fallback=allow_fallback,
            keep_float16=keep_float16,
            threads=threads,
            spin=spin,
            check_file=check_file,
            backend=backend,
        )
        try:
            return cls(opened, name=str(path), slots=slots, check_finite=check_finite)
        except UsageError:
            opened.close()
            raise

    @property
    def device(self) -> str:
        """The device that runs the model: "cpu" or "cuda:N"."""
        return self._backend.device

    @property
    def overlaps(self) -> bool:
        """Whether `step_async` returns before the step is done, so that a second step may be started meanwhile."""
        return self._backend.overlaps

    @property
    def description(self) -> str:
        """Back end, version and device, for display."""
        return self._backend.description

    @property
    def check_finite(self) -> bool:
        """Whether inputs with NaN or Inf are refused; may be changed between two steps."""
        return self._inputs.check_finite

    @check_finite.setter
    def check_finite(self, check: bool) -> None:
        self._inputs.check_finite = check

    @property
    def slots(self) -> dict[str, Slot]:
        """The attached slots by name; empty if the loop has no slots."""
        return {} if self._slots is None else self._slots.attached

    def step(self, /, **inputs: ArrayLike | OnDevice) -> dict[str, NDArray[Any]]:
        """One step of the whole batch.

        Args:
            inputs: data inputs by name: numpy arrays, or objects that numpy reads (`__array__`, DLPack on the CPU).
                One that has a value in the contract may be left out.
                Floats are cast to the dtype of the contract; integers are refused for a float input, since their
                scale is not known. A model on a GPU also takes arrays on that GPU (DLPack or
                `__cuda_array_interface__`) with the dtype of the contract; these are not checked for NaN.

        Returns:
            Data outputs by name, with the dtypes of the contract. Later steps do not change them.

        Raises:
            InputError: a name, shape, dtype or value that does not fit.
            UsageError: the loop has slots.
            DeviceError: the device failed or ran out of memory.
        """
        started = time.perf_counter()
        outputs = self._backend.step(self._batch(inputs))
        self.latency.add(time.perf_counter() - started)
        return outputs

    def step_async(self, /, **inputs: ArrayLike | OnDevice) -> StepFuture[dict[str, NDArray[Any]]]:
        """Start a step of the whole batch. Arguments and errors are those of `step`.

        With TensorRT, the next frame is uploaded and the last outputs are downloaded while this step runs. At most
        two steps run at a time: a third call first waits for the oldest, whose outputs are kept until its `result`
        is called. In ONNX Runtime the whole step runs in this call.

        Steps run in the order of the calls, and all other methods see the states after the last step that was
        started. Arrays on the host may be written to again when this returns, arrays on the GPU when `result` returns.

        Returns:
            A future whose `result()` returns the outputs, or raises the error of the device. If no later step was
            started, the states are then those before the step.
        """
        started = time.perf_counter()
        return self._timed(self._backend.enqueue(self._batch(inputs)), started)

    def step_on_device(self, /, **inputs: ArrayLike | OnDevice) -> dict[str, DeviceArray]:
        """Start a step whose outputs stay on the GPU, readable by DLPack or `__cuda_array_interface__`.

        It returns before they are computed; a consumer that follows either protocol waits on its own stream
        (`torch.from_dlpack` and `cupy.from_dlpack` do). They are valid until the step after the next one starts, or
        until `reset()` or `close()`: all work that reads them must be done by then.

        Raises:
            UsageError: the loop has slots, or runs in ONNX Runtime.
            InputError, DeviceError: as for `step`.
        """
        return self._backend.step_on_device(self._batch(inputs))

    def attach(self, name: str | None = None) -> Slot:
        """Occupy a free slot, with its states at their initial values.

        Args:
            name: name of the stream, for messages, reports and snapshots; None: the number of the row.

        Raises:
            StateError: all slots are in use, or the name is taken.
            UsageError: the loop has no slots.
        """
        slot = self._table().attach(name)
        self._states.reset_rows(self._table().mask([slot]))
        return slot

    def detach(self, slot: Slot) -> None:
        """Free a slot. All later calls refuse it.

        Raises:
            StateError: it is not attached.
        """
        self._table().detach(slot)

    def step_slots(self, frames: Mapping[Slot, Mapping[str, ArrayLike]]) -> dict[Slot, dict[str, NDArray[Any]]]:
        """One step of the slots that have a frame. The other slots keep their states, bit by bit.

        ncnn computes the rows with a frame, ONNX Runtime and TensorRT the whole batch.

        Args:
            frames: inputs by name for each slot, as `step` takes them, with batch size 1.

        Returns:
            Outputs by name for each of these slots, with batch size 1.

        Raises:
            InputError: as for `step`, with the name of the slot; no slot has stepped then.
            StateError: a slot is not attached.
            UsageError: the loop has no slots.
            DeviceError: the device failed or ran out of memory.
        """
        return self.step_slots_async(frames).result()

    def step_slots_async(
        self, frames: Mapping[Slot, Mapping[str, ArrayLike]]
    ) -> StepFuture[dict[Slot, dict[str, NDArray[Any]]]]:
        """Start a step of the slots that have a frame, as `step_async` does for the whole batch."""
        table = self._table()
        table.require(frames)
        if not frames:
            return StepFuture(dict)
        started = time.perf_counter()
        arrays = {slot: self._inputs.convert_slot(slot, inputs) for slot, inputs in frames.items()}
        batch = table.pack(arrays)
        self._inputs.require_finite_slots(batch if len(arrays) == table.count else None, arrays)
        self._fix_sizes({name: array.shape for name, array in batch.items()})
        idle = table.idle(frames, vacant=self._backend.skips_idle)
        running = self._timed(self._backend.enqueue(batch, idle), started)
        slots = list(frames)
        return StepFuture(lambda: table.unpack(running.result(), slots))

    def reset(self, slots: Sequence[bool] | Collection[Slot] | None = None) -> None:
        """Set states to their initial values. They are assigned, so NaN is cleared too.

        Args:
            slots: the rows to reset; all others keep their states, bit by bit. A collection of `Slot` for a loop with
                slots, otherwise one boolean for each row of the batch. None: all rows, and the sizes are freed.

        Raises:
            InputError: not one boolean per row of the batch.
            StateError: booleans before the first step, when the sizes are not known; or a slot is not attached.
        """
        self._require_open()
        if slots is None:
            self._states.forget()
            self._inputs.free()
        elif self._slots is not None:
            chosen: list[Any] = list(slots)
            self._slots.require(chosen)
            self._states.reset_rows(self._slots.mask(chosen))
        else:
            self._states.reset_rows(self._states.rows(slots))

    def state(self, slot: Slot | None = None) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name; with a slot, of its states, with batch size 1.

        Raises:
            StateError: no step has run yet, and no state was loaded; or the slot is not attached.
            UsageError: a slot, and the loop has none.
        """
        self._require_open()
        return self._states.read() if slot is None else self._states.read_row(self._row(slot))

    def load_state(self, state: Mapping[str, ArrayLike], slot: Slot | None = None) -> None:
        """Replace every state, for example by what `state()` returned. It may be called before the first step.

        Args:
            state: arrays by name.
            slot: replace its states only, by arrays of batch size 1; all other slots keep theirs, bit by bit.

        Raises:
            StateError: a name is missing or unknown, or an array has another shape or is not of floats; or the slot is
                not attached. Before the first step the sizes are not known; they are compared in that step.
            UsageError: a slot, and the loop has none.
        """
        self._require_open()
        count = None if self._slots is None else self._slots.count
        if slot is None:
            self._states.load(as_states(self.contract, state, count))
        else:
            row = self._row(slot)
            self._states.load_row(as_states(self.contract, state, 1), row, self._table().count)

    def save(
        self,
        path: str | Path,
        slot: Slot | None = None,
        *,
        frame: int = 0,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write all states and the names of the slots to a snapshot file, for `restore`.

        Args:
            path: a .safetensors file. A snapshot there is replaced atomically.
            slot: write its states only, as a snapshot of one stream.
            frame: number of frames stepped so far, or any number that the caller continues from.
            metadata: the caller's own; returned by `restore`.
            overwrite: replace an existing file that is no snapshot.

        Raises:
            StateError: no step has run yet, and no state was loaded; or the slot is not attached.
            UsageError: there is a file that is no snapshot; or a slot, and the loop has none.
            OutputError: the file cannot be written.
        """
        write_snapshot(Path(path), *self.capture(slot, frame=frame, metadata=metadata), overwrite=overwrite)

    def capture(
        self, slot: Slot | None = None, *, frame: int = 0, metadata: Mapping[str, str] | None = None
    ) -> tuple[dict[str, NDArray[Any]], Snapshot]:
        """The states as they are now and their description, for `write_snapshot`; arguments are those of `save`.

        Raises:
            StateError, UsageError: as for `state`.
        """
        slots, rows = None, None
        if slot is not None:
            slots, rows = {slot.name: 0}, 1
        elif self._slots is not None:
            slots, rows = {name: held.index for name, held in self.slots.items()}, self._slots.count
        return self.state(slot), Snapshot(
            contract_hash=contract_hash(self.contract),
            frame=frame,
            slots=slots,
            rows=rows,
            metadata=dict(metadata or {}),
        )

    def restore(self, path: str | Path, slot: Slot | None = None) -> Snapshot:
        """Load a snapshot of the same model, taken on any back end. It may be called before the first step.

        Without `slot`, exactly the slots of the snapshot are attached afterwards; `slots` has them by name. A slot that
        is attached in the same row under the same name stays valid. A loop without slots also takes a snapshot of one
        stream, if its batch is 1.

        Args:
            path: a .safetensors file.
            slot: load a snapshot of one stream into it: one of a slot of any loop, in any row, or of a loop without
                slots whose batch is 1. All other slots keep their states, bit by bit.

        Raises:
            InputError: the file cannot be read, is damaged or is not a snapshot.
            StateError: it belongs to another model, has another number of slots or streams, or other sizes (see
                `load_state`); or the slot is not attached.
            UsageError: a slot, and the loop has none.
        """
        self._require_open()
        if slot is not None:
            self._row(slot)
        states, snapshot = read_snapshot(Path(path), self.contract)
        self._require_rows(f"{path}", states, snapshot.rows, slot)
        self.load_state(states, slot)
        if self._slots is not None and slot is None:
            self._slots.replace(snapshot.slots or {})
        return snapshot

    def interrupt(self) -> None:
        """Ask a step that runs in another thread to end with an error; returns at once.

        ONNX Runtime ends it before the next node of the graph; TensorRT cannot end a step.
        """
        self._backend.interrupt()

    def close(self) -> None:
        """Free the model. Calling it twice is allowed."""
        if not self._closed:
            self._closed = True
            self._inputs.free()
            self._backend.close()

    def __enter__(self) -> StepLoop:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batch(self, inputs: Mapping[str, ArrayLike | OnDevice]) -> Mapping[str, NDArray[Any] | DeviceArray]:
        """The inputs of a step of the whole batch, converted and checked; fixes the sizes."""
        inputs = self._inputs.complete(inputs)
        if self._inputs.are_converted(inputs):  # never true for a closed loop or one with slots
            return inputs
        self._require_open()
        if self._slots is not None:
            raise UsageError(f"{self.name}: opened with slots, which are stepped by step_slots({{slot: inputs}})")
        arrays = self._inputs.convert(inputs)
        shapes = {name: array.shape for name, array in arrays.items()}
        self._fix_sizes(shapes)
        self._inputs.fix(shapes)
        return arrays

    def _fix_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes != self._states.input_shapes:
            self._states.fix_sizes(shapes)

    def _timed(
        self, running: StepFuture[dict[str, NDArray[Any]]], started: float
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        def collect() -> dict[str, NDArray[Any]]:
            outputs = running.result()
            self.latency.add(time.perf_counter() - started)
            return outputs

        return StepFuture(collect)

    def _table(self) -> SlotTable:
        self._require_open()
        if self._slots is None:
            raise UsageError(f"{self.name}: opened without slots", hint="StepLoop.open(..., slots=N)")
        return self._slots

    def _row(self, slot: Slot) -> int:
        self._table().require([slot])
        return slot.index

    def _require_rows(
        self, subject: str, states: Mapping[str, NDArray[Any]], rows: int | None, slot: Slot | None
    ) -> None:
        """Raise StateError unless a snapshot, taken from a loop with so many slots, fits this one or the slot."""
        streams = rows or stream_count(self.contract, as_states(self.contract, states, None))
        own = None if self._slots is None else self._slots.count
        if slot is not None:
            if streams != 1:
                raise StateError(
                    f"{subject}: holds the states of {streams} streams, and slot {slot.name} takes those of one",
                    hint="restore it as a whole, and write a snapshot of one stream: loop.save(path, slot)",
                )
        elif rows != own and not (own is None and streams == 1):
            wanted, got = (f"slots={count}" if count else "no slots" for count in (rows, own))
            raise StateError(
                f"{subject}: was taken from a loop with {wanted}, this one has {got}",
                hint="it holds one stream, which a slot takes: loop.restore(path, loop.attach())"
                if streams == 1
                else None,
            )

    def _require_open(self) -> None:
        if self._closed:
            raise StepcellError(f"{self.name}: this loop is closed", hint="open the model again: StepLoop.open(...)")
