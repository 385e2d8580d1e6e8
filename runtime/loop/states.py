"""States of a step loop: their sizes, a state loaded before the first step, and checks of what a caller loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.contract import StateSpec, StepContract
from stepcell.dims import evaluate
from stepcell.errors import InputError, StateError
from stepcell.runtime.backends.base import Backend
from stepcell.runtime.loop.slots import require_streams, row_of

__all__ = ["LoopStates", "as_states", "stream_count"]


class LoopStates:
    """The states of one back end. Their sizes follow from the shapes of the first step's inputs.

    Args:
        backend: holds the states.
        name: name of the model, for messages.

    Attributes:
        input_shapes: shapes of the data inputs by name; None: not fixed yet.
    """

    def __init__(self, backend: Backend, name: str) -> None:
        self._backend, self._contract, self._name = backend, backend.contract, name
        self.input_shapes: dict[str, tuple[int, ...]] | None = None
        self._symbols: dict[str, int] | None = None  # the sizes that the back end is configured for
        self._loaded: dict[str, NDArray[Any]] | None = None  # a state loaded before the first step

    def fix_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Configure the back end for these input shapes, with the states at their initial or loaded values.

        Raises:
            InputError: other sizes are fixed already, or the model does not take these.
            StateError: a loaded state has another size.
            DeviceError: the buffers do not fit in memory.
        """
        if self.input_shapes is not None:
            name = next(name for name in shapes if shapes[name] != self.input_shapes[name])
            raise InputError(
                f"{name}: expected shape {self.input_shapes[name]} as in the first step, got {shapes[name]}",
                hint="reset() forgets the states and frees the sizes",
            )
        symbols = self._contract.bind(shapes)
        if symbols == self._symbols:
            self._backend.reset()
        else:
            self._symbols = None
            self._backend.configure(symbols)
            self._symbols = symbols
        if self._loaded is not None:
            self._write(self._loaded)
            self._loaded = None
        self.input_shapes = shapes

    def forget(self) -> None:
        """Drop the states and free the sizes."""
        self.input_shapes = self._loaded = None

    def reset_rows(self, rows: Sequence[bool]) -> None:
        """Set the rows of the batch axis that are True to the initial values."""
        if self.input_shapes is not None:
            self._backend.reset(rows)
        elif self._loaded is not None:  # without a loaded state, the first step starts from the initial values
            for spec in self._contract.states:
                array, chosen = self._loaded[spec.name], np.flatnonzero(rows)
                spec.by_stream(array)[chosen] = spec.by_stream(spec.initial(array.shape))[chosen]

    def read(self) -> dict[str, NDArray[Any]]:
        """A copy of every state, by name.

        Raises:
            StateError: no step has run yet, and no state was loaded.
        """
        if self.input_shapes is None and self._loaded is not None:
            return {name: array.copy() for name, array in self._loaded.items()}
        self._require_sizes()
        return self._backend.read_state()

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Replace every state, now or in the first step.

        Raises:
            StateError: an array has another size.
        """
        if self.input_shapes is None:
            self._loaded = arrays
        else:
            self._write(arrays)

    def read_row(self, row: int) -> dict[str, NDArray[Any]]:
        """A copy of one row of every state, with a batch axis of size 1; errors are those of `read`."""
        if self.input_shapes is not None:
            return self._backend.read_row(row)
        states = self.read()
        return {
            spec.name: row_of(states[spec.name], spec.batch_axis or 0, row).copy() for spec in self._contract.states
        }

    def load_row(self, arrays: Mapping[str, NDArray[Any]], row: int, count: int) -> None:
        """Replace one of `count` rows, now or in the first step; the others keep their states, bit by bit.

        Before the first step, the rows that were not loaded are set to their initial values.

        Raises:
            StateError: an array has another size than the other rows.
        """
        if self.input_shapes is not None:
            for spec in self._contract.states:
                shape = _with_rows(spec, self._shapes()[spec.name], 1)
                _require_row_shape(spec, arrays[spec.name], shape)
            self._backend.write_row(row, arrays)
            return
        if self._loaded is None:
            states = {spec.name: _initial_rows(spec, arrays[spec.name].shape, count) for spec in self._contract.states}
        else:
            states = self.read()
        for spec in self._contract.states:
            target = row_of(states[spec.name], spec.batch_axis or 0, row)
            _require_row_shape(spec, arrays[spec.name], target.shape)
            target[...] = arrays[spec.name]
        self.load(states)

    def rows(self, flags: Any) -> list[bool]:
        """Flags given by the caller, one boolean per row of the batch.

        Raises:
            InputError: something else.
            UsageError: the model steps one stream.
            StateError: no step has run yet.
        """
        require_streams(self._contract)
        self._require_sizes()
        counts = {evaluate(spec.streams, self._symbols or {}) for spec in self._contract.states}
        array = np.asarray(flags)
        if array.dtype != bool or array.ndim != 1 or (counts and {len(array)} != counts):
            wanted = max(counts, default=1)
            raise InputError(f"slots: expected {wanted} booleans, one per row of the batch, got {flags!r}")
        rows: list[bool] = array.tolist()
        return rows

    def _write(self, arrays: dict[str, NDArray[Any]]) -> None:
        for name, shape in self._shapes().items():
            if arrays[name].shape != shape:
                raise StateError(
                    f"{name}: expected shape {shape} for these inputs, got {arrays[name].shape}",
                    hint="a state belongs to one frame size; reset() forgets it",
                )
        self._backend.write_state(arrays)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self._contract.state_shapes(self._symbols or {})

    def _require_sizes(self) -> None:
        if self.input_shapes is None:
            raise StateError(f"{self._name}: no step has run yet, so the states have no size")


def as_states(contract: StepContract, state: Mapping[str, ArrayLike], rows: int | None) -> dict[str, NDArray[Any]]:
    """Copies of states given by the caller, in the dtypes of the contract.

    Args:
        rows: size of the batch axis, if it is known.

    Raises:
        StateError: a name is missing or unknown, or an array has another kind of dtype, rank or batch size.
    """
    names = [spec.name for spec in contract.states]
    if set(state) != set(names):
        raise StateError(
            f"states: expected {', '.join(names) or 'none'}, got {', '.join(map(str, state)) or 'none'}",
            hint="the snapshot belongs to another model" if state else None,
        )
    arrays = {}
    for spec in contract.states:
        array = np.array(state[spec.name])
        if array.dtype.kind != np.dtype(spec.dtype).kind or not _fits(array.shape, spec):
            raise StateError(
                f"{spec.name}: expected {spec.dtype} of shape {spec.shape}, got {array.dtype} {array.shape}"
            )
        if rows is not None and len(spec.by_stream(array)) != rows:
            streams = "1 stream" if rows == 1 else f"{rows} slots"
            raise StateError(f"{spec.name}: expected {streams} on axis {spec.batch_axis}, got {array.shape}")
        with np.errstate(over="ignore"):  # a value beyond float16 becomes Inf, as it would in the model
            arrays[spec.name] = np.ascontiguousarray(array, spec.dtype)
    return arrays


def stream_count(contract: StepContract, states: Mapping[str, NDArray[Any]]) -> int:
    """The number of streams whose states these are; 1 for a model without states."""
    return max((len(spec.by_stream(states[spec.name])) for spec in contract.states), default=1)


def _fits(shape: tuple[int, ...], spec: StateSpec) -> bool:
    """Whether an array has the rank of a state and its fixed sizes, except that of the batch axis."""
    return len(shape) == len(spec.shape) and all(
        axis == spec.batch_axis or not isinstance(dim, int) or dim == size
        for axis, (dim, size) in enumerate(zip(spec.shape, shape, strict=True))
    )


def _initial_rows(spec: StateSpec, shape: tuple[int, ...], count: int) -> NDArray[Any]:
    """Initial values of `count` rows, each with the size of a row of this shape."""
    return np.array(spec.initial(_with_rows(spec, shape, count)))


def _with_rows(spec: StateSpec, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    axis = spec.batch_axis or 0
    return (*shape[:axis], count, *shape[axis + 1 :])


def _require_row_shape(spec: StateSpec, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise StateError(
            f"{spec.name}: expected shape {shape} as in the other slots, got {array.shape}",
            hint="all slots of a loop have one size; open another loop for another size",
        )
