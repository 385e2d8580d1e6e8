"""Checks of a state contract as a whole, made when it is written and whenever one is read.

A contract comes from a file: a value that passes here cannot make the step loop, the preprocessing or the build fail
in a library later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from stepcell.dims import LARGEST, check_dim, symbols_of
from stepcell.display import printable
from stepcell.errors import ContractError
from stepcell.nv12 import nv12_of
from stepcell.pixels import pixel_fault

if TYPE_CHECKING:
    from stepcell.contract import Spec, StateSpec, StepContract, TensorSpec

__all__ = ["MAX_INITIAL_BYTES", "check_contract"]

MAX_INITIAL_BYTES = 4 << 20  # of one initial value, which is part of the JSON document
_MAX_NAME, _MAX_RANK, _MAX_MULTIPLE = 1000, 8, 1 << 16
_MAX_BINS = 1000  # time bins of an event tensor; published models have up to 20
_MAX_WINDOW = 1 << 53  # microseconds or events: exact in a double


def check_contract(contract: StepContract, subject: str) -> None:
    """Raise ContractError unless every field is usable and all fit each other.

    Names are unique and printable, shapes are numbers and expressions whose symbols the inputs define, layouts name
    the axes, pixel fields have the right lengths, initial values fit their states.
    """
    for side in (contract.inputs, contract.outputs, contract.states):
        for spec in side:
            _check_name(spec.name, subject)
            _check_shape(spec, f"{subject}: {spec.name}")
    inputs, outputs = [spec.name for spec in contract.inputs], [spec.name for spec in contract.outputs]
    _check_unique([*inputs, *(state.name for state in contract.states)], "inputs and states", subject)
    _check_unique([*inputs, *(state.input for state in contract.states)], "inputs of the graph", subject)
    _check_unique([*outputs, *(state.output for state in contract.states)], "outputs of the graph", subject)
    known = set(contract.symbols)
    for spec in contract.graph_outputs.values():
        unknown = set(symbols_of(spec.shape)) - known
        if unknown:
            raise ContractError(
                f"{subject}: {spec.name}: shape {spec.shape} uses {sorted(unknown)}, which no input defines"
            )
    for tensor in (*contract.inputs, *contract.outputs):
        _check_pixels(tensor, f"{subject}: {tensor.name}")
        _check_streams(tensor, f"{subject}: {tensor.name}")
    for state in contract.states:
        if state.batch_axis is not None and not 0 <= state.batch_axis < len(state.shape):
            raise ContractError(
                f"{subject}: {state.name}: batch_axis {state.batch_axis} is not an axis of {state.shape}"
            )
        _check_initial(state, subject)
    for tensor in contract.inputs:
        _check_events(tensor, subject)
    for symbol, size in contract.example.items():
        if not 1 <= size <= LARGEST:
            raise ContractError(f"{subject}: example: {symbol}: expected a size of 1 to {LARGEST}, got {size}")


def _check_unique(names: list[str], what: str, subject: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ContractError(f"{subject}: names of {what} must be unique, got twice: {repeated}")


def _check_name(name: str, subject: str) -> None:
    if not 0 < len(name) <= _MAX_NAME or printable(name) != name or any(letter in name for letter in "\n\t"):
        raise ContractError(
            f"{subject}: expected a name of 1 to {_MAX_NAME} characters without control characters, got {name[:40]!r}"
        )


def _check_shape(spec: Spec, subject: str) -> None:
    if len(spec.shape) > _MAX_RANK:
        raise ContractError(f"{subject}: expected at most {_MAX_RANK} axes, got {len(spec.shape)}")
    for dim in spec.shape:
        try:
            check_dim(dim)
        except ContractError as error:
            raise ContractError(f"{subject}: {error.message}", hint=error.hint) from error


def _check_pixels(spec: TensorSpec, subject: str) -> None:
    """Check layout, range, mean, standard deviation, order of the channels and padding."""
    if fault := pixel_fault(spec):
        raise ContractError(f"{subject}: {fault}")
    if nv12_of(spec) and (spec.dtype != "uint8" or len(spec.shape) not in (2, 3) or spec.layout is not None):
        raise ContractError(
            f"{subject}: NV12 is uint8 (batch, height * 3 // 2, width) without a layout, got {spec.dtype} {spec.shape}"
        )
    if not 1 <= spec.pad_multiple <= _MAX_MULTIPLE or (spec.pad_multiple > 1 and spec.layout is None):
        raise ContractError(
            f"{subject}: pad_multiple: expected 1 to {_MAX_MULTIPLE}, above 1 with a layout, got {spec.pad_multiple}"
        )


def _check_events(spec: TensorSpec, subject: str) -> None:
    """Check that the shape of an event tensor fits its bins, and that its window can be cut."""
    events = spec.events
    if isinstance(events, msgspec.UnsetType):
        return
    if spec.layout != "NCHW" or len(spec.shape) != 4 or not spec.dtype.startswith("float"):
        raise ContractError(
            f"{subject}: {spec.name}: events need floats of layout NCHW, got {spec.dtype} {spec.layout} {spec.shape}"
        )
    if not 1 <= events.bins <= _MAX_BINS or spec.shape[1] != events.channels:
        raise ContractError(
            f"{subject}: {spec.name}: {events.bins} bins with polarity {events.polarity} make "
            f"{events.channels} channels, the shape has {spec.shape[1]}"
        )
    if events.convention and events.representation != "voxel_grid":
        raise ContractError(
            f"{subject}: {spec.name}: tonic's convention is one of voxel_grid, got {events.representation}"
        )
    size, unit = events.window.size, events.window.unit
    if not 0 < size <= _MAX_WINDOW or (unit != "events/pixel" and size != int(size)):
        whole = "above zero" if unit == "events/pixel" else f"of whole {unit}, at least 1"
        raise ContractError(f"{subject}: {spec.name}: expected a window {whole}, got {size:g} {unit}")


def _check_streams(spec: TensorSpec, subject: str) -> None:
    """Check that the axis of the streams is one, and that a value fits the tensor."""
    if isinstance(spec.batch_axis, int) and not 0 <= spec.batch_axis < len(spec.shape):
        raise ContractError(f"{subject}: batch_axis {spec.batch_axis} is not an axis of {spec.shape}")
    if isinstance(spec.value, msgspec.UnsetType) or len(spec.value) == 1:
        return
    sizes = [dim for dim in spec.shape if isinstance(dim, int)]
    if len(sizes) < len(spec.shape) or len(spec.value) != math.prod(sizes):
        raise ContractError(f"{subject}: a value of {len(spec.value)} numbers does not fit {spec.shape}")


def _check_initial(state: StateSpec, subject: str) -> None:
    """Check that an initial value fits the state at every size."""
    if isinstance(state.init, str):
        return
    name, init = f"{subject}: {state.name}: initial value", state.init
    if not state.dtype.startswith("float"):
        raise ContractError(f"{name}: only floating-point states can have one, this one is {state.dtype}")
    dims = state.shape
    if state.batch_axis is not None:
        dims = state.shape[: state.batch_axis] + state.shape[state.batch_axis + 1 :]
    if len(init.shape) != len(dims) or any(size not in (1, dim) for size, dim in zip(init.shape, dims, strict=True)):
        raise ContractError(
            f"{name}: expected shape {dims}, or 1 for an axis, got {init.shape}",
            hint="a value per position needs a fixed height and width: export with --shape",
        )
    size = math.prod(init.shape) * np.dtype(init.dtype).itemsize
    if size > MAX_INITIAL_BYTES or len(init.data) != size:
        raise ContractError(
            f"{name}: expected {size} bytes of {init.dtype}, at most {MAX_INITIAL_BYTES}, got {len(init.data)}"
        )
    if not np.isfinite(init.array()).all():
        raise ContractError(f"{name}: holds NaN or Inf")
