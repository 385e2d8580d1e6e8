"""ncnn back end: runs the float32 form of an ONNX file on the CPU, one stream at a time.

Every row of the batch has states of its own, kept as ncnn's matrices in the layout in which ncnn computed them: rows
without a frame cost nothing, and no state is converted between steps. A step reads the old matrices and makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import Spec, StepContract
from stepcell.dims import resolve, symbols_of
from stepcell.errors import StepcellError, UsageError
from stepcell.library_errors import as_stepcell_error
from stepcell.runtime.backends.base import StepFuture
from stepcell.runtime.backends.ncnn.convert import convert
from stepcell.runtime.backends.ncnn.graph import Network, NotConvertible
from stepcell.runtime.backends.ncnn.net import Net, load_ncnn
from stepcell.runtime.backends.ncnn.order import states_first
from stepcell.runtime.backends.onnxruntime.backend import OrtBackend
from stepcell.runtime.cuda import DeviceArray

__all__ = ["NcnnBackend"]


class NcnnBackend:
    """A `Backend` for ONNX files that ncnn can compute.

    Args:
        path: of the file, for messages.
        source: the same file in ONNX Runtime on the CPU.
        threads: number of threads for one step; None: one per core.

    Raises:
        MissingDependencyError: ncnn is not installed.
    """

    overlaps = False
    skips_idle = True

    def __init__(self, path: Path, source: OrtBackend, *, threads: int | None = None) -> None:
        self._path, self._source, self._threads = path, source, threads
        self.contract: StepContract = source.contract
        self.device = "cpu"
        self.description = f"ncnn {load_ncnn().__version__}, CPU, {self.contract.precision}"
        self.network: Network | None = None
        self._net: Net | None = None
        self._symbols: Mapping[str, int] = {}
        self._rows = 0
        self._inputs: dict[str, tuple[Any, NDArray[np.float32]]] = {}  # matrices that are filled in each step
        self._states: list[dict[str, Any]] = []  # matrices by state, for each row
        self._interrupted = False

    @property
    def input_stream(self) -> int | None:
        """None: inputs are on the host."""
        return None

    def configure(self, symbols: Mapping[str, int]) -> None:
        """As `Backend.configure`.

        Raises:
            NotConvertible: ncnn cannot compute this model.
        """
        self.release()
        self._rows, of_one_row = _rows(self.contract, symbols)
        try:
            model = self._source.simplified(of_one_row)
            if model is None:
                raise NotConvertible("its weights are too large")
            states_first(model, [state.input for state in self.contract.states])
            self.network = convert(model)
            self._net = Net(self.network, self._threads)
            self._inputs = {
                spec.name: self._net.matrix(spec.name)
                for spec in self.contract.inputs
                if spec.name in self.network.inputs
            }
        except NotConvertible:
            raise
        except Exception as error:
            raise self._failure("it cannot be loaded", error) from error
        self._symbols = dict(symbols)
        self.reset()

    def step(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> dict[str, NDArray[Any]]:
        contract = self.contract
        outputs = {spec.name: np.zeros(resolve(spec.shape, self._symbols), spec.dtype) for spec in contract.outputs}
        states = list(self._states)
        self._interrupted = False
        try:
            for row in range(self._rows):
                if row not in idle:
                    states[row] = self._step_row(row, inputs, outputs)
        except Exception as error:
            raise self._failure("the step failed", error) from error
        self._states = states
        return outputs

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        """Run the whole step in this call."""
        outputs = self.step(inputs, idle)
        return StepFuture(lambda: outputs)

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """Not supported: raises UsageError."""
        raise UsageError(
            f"{self._path}: ncnn returns its outputs on the host",
            hint="use step(), or build an engine: `stepcell build`",
        )

    def interrupt(self) -> None:
        """Ask a step that runs in another thread to end, which it does before the next row."""
        self._interrupted = True

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        chosen = range(self._rows) if rows is None else np.flatnonzero(rows).tolist()
        shapes = self._shapes(len(chosen))
        if rows is None:
            self._states = [{} for _ in chosen]
        self._write({state.name: state.initial(shapes[state.name]) for state in self.contract.states}, chosen)

    def read_state(self) -> dict[str, NDArray[Any]]:
        return self._read(range(self._rows))

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._write(state, range(self._rows))

    def read_row(self, row: int) -> dict[str, NDArray[Any]]:
        return self._read([row])

    def write_row(self, row: int, state: Mapping[str, NDArray[Any]]) -> None:
        self._write(state, [row])

    def release(self) -> None:
        """Free the network and the states; `configure` loads it again."""
        self._states, self._inputs, self._net, self.network = [], {}, None, None

    def close(self) -> None:
        self.release()
        self._source.close()

    def _step_row(self, row: int, inputs: Mapping[str, Any], outputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """One step of one row: its outputs are written, its new states returned."""
        if self._interrupted:
            raise StepcellError("it was asked to end")
        net, states = self._loaded(), self._states[row]
        matrices = {spec.input: states[spec.name] for spec in self.contract.states}
        for name, (matrix, view) in self._inputs.items():
            view[...] = _row(inputs[name], row, self._rows).reshape(view.shape)
            matrices[name] = matrix
        found = net.step(matrices, outputs, [spec.output for spec in self.contract.states])
        for name, array in outputs.items():
            part = _row(array, row, self._rows)
            part[...] = net.values(found[name]).reshape(part.shape)
        return {spec.name: found[spec.output] for spec in self.contract.states}

    def _read(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Copies of these rows of every state, one after another."""
        shapes, net = self._shapes(len(rows)), self._loaded()
        found = {}
        for state in self.contract.states:
            found[state.name] = array = np.empty(shapes[state.name], state.dtype)
            for place, row in enumerate(rows):
                part = _row(array, place, len(rows))
                part[...] = net.values(self._states[row][state.name]).reshape(part.shape)
        return found

    def _write(self, arrays: Mapping[str, NDArray[Any]], rows: Sequence[int]) -> None:
        """Replace these rows of every state by those of the arrays, one after another."""
        net = self._loaded()
        for place, row in enumerate(rows):
            states = dict(self._states[row])
            for state in self.contract.states:
                matrix, view = net.matrix(state.input)
                view[...] = _row(arrays[state.name], place, len(rows)).reshape(view.shape)
                states[state.name] = matrix
            self._states[row] = states

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Shapes of so many rows of every state."""
        shapes = self.contract.state_shapes(self._symbols)
        return shapes if rows == self._rows else {name: (rows, *shape[1:]) for name, shape in shapes.items()}

    def _loaded(self) -> Net:
        assert self._net is not None  # the loop configures a back end before it steps it
        return self._net

    def _failure(self, what: str, error: Exception) -> StepcellError:
        return as_stepcell_error(error, str(self._path), what=f"{what} in ncnn on the CPU")


def _row(array: NDArray[Any], row: int, rows: int) -> NDArray[Any]:
    """A view of one row."""
    return array if rows == 1 else array[row : row + 1]


def _rows(contract: StepContract, symbols: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The number of streams, and the sizes of a graph with one.

    Raises:
        NotConvertible: the streams cannot be computed one by one.
    """
    specs: list[Spec] = [*contract.states, *contract.inputs, *contract.outputs]
    dims = {spec.shape[0] if spec.shape else 1 for spec in specs}
    inner = symbols_of(dim for spec in specs for dim in spec.shape[1:])
    for state in contract.states:
        if state.dtype != "float32":
            raise NotConvertible(f"state {state.name}: of type {state.dtype}")
    if dims == {1}:
        return 1, dict(symbols)
    dim = next((dim for dim in dims if isinstance(dim, str)), "")
    if dims != {dim} or not dim.isidentifier() or dim in inner:
        names = ", ".join(f"{spec.name} {spec.shape}" for spec in specs)
        raise NotConvertible(f"its streams are not a free first axis of every tensor: {names}")
    return symbols[dim], {**symbols, dim: 1}
