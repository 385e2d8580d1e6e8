"""States that a caller gives to a loop, and which rows of them are meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.contract import StepContract
from stepcell.errors import InputError, StateError

__all__ = ["as_flags", "as_states", "forget_rows", "require_shapes"]


def as_states(contract: StepContract, state: Mapping[str, ArrayLike], rows: int | None) -> dict[str, NDArray[Any]]:
    """Copies in the contract's dtypes.

    Args:
        rows: size of the batch axis, where that is known.

    Raises:
        StateError: a name is missing or unknown, or an array is of another kind, rank or batch.
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
        if array.dtype.kind != np.dtype(spec.dtype).kind or array.ndim != len(spec.shape):
            raise StateError(
                f"{spec.name}: expected {spec.dtype} of shape {spec.shape}, got {array.dtype} {array.shape}"
            )
        if rows is not None and array.shape[spec.batch_axis] != rows:
            raise StateError(f"{spec.name}: expected {rows} slots on axis {spec.batch_axis}, got {array.shape}")
        with np.errstate(over="ignore"):  # beyond float16 it becomes Inf, as it would in the model
            arrays[spec.name] = np.ascontiguousarray(array, spec.dtype)
    return arrays


def require_shapes(arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StateError where a state has another shape."""
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise StateError(
                f"{name}: expected shape {shape} for these inputs, got {arrays[name].shape}",
                hint="a state belongs to one frame size; reset() forgets it",
            )


def as_flags(slots: Any, contract: StepContract, shapes: Mapping[str, tuple[int, ...]]) -> list[bool]:
    """One boolean per row of the batch.

    Raises:
        InputError: something else.
    """
    rows = {shapes[spec.name][spec.batch_axis] for spec in contract.states}
    flags = np.asarray(slots)
    if flags.dtype != bool or flags.ndim != 1 or (rows and {len(flags)} != rows):
        raise InputError(f"slots: expected {max(rows, default=1)} booleans, one per row of the batch, got {slots!r}")
    chosen: list[bool] = flags.tolist()
    return chosen


def forget_rows(contract: StepContract, arrays: Mapping[str, NDArray[Any]], rows: Sequence[bool]) -> None:
    """Set the rows that are True to the initial values, in place."""
    for spec in contract.states:
        array = arrays[spec.name]
        index = (slice(None),) * spec.batch_axis + (np.flatnonzero(rows),)
        array[index] = spec.initial(array.shape)[index]
