"""Inputs of a step: conversion to the dtypes of the contract, and the checks that refuse what cannot be converted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard, get_args

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.contract import DType, TensorSpec
from stepcell.dims import bind, resolve, symbols_of
from stepcell.errors import InputError
from stepcell.runtime.backends.base import Backend, Device
from stepcell.runtime.cuda import DeviceArray, OnDevice, is_on_device, read_device_array
from stepcell.runtime.loop.slots import Slot

__all__ = ["StepInputs", "as_input", "require_finite"]

# Up to this number of elements, a sum of squares is faster than checking each of them. From some 10,000 elements on,
# BLAS would use threads, which keep their cores busy between two steps.
_MAX_DOT = 8192
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in get_args(DType)}


class StepInputs:
    """Converts and checks the inputs of a step.

    Args:
        backend: whose contract names the inputs, and whose stream reads arrays on a GPU.
        check_finite: refuse NaN and Inf in arrays on the host; may be changed at any time.
    """

    def __init__(self, backend: Backend, *, check_finite: bool) -> None:
        self._backend, self.check_finite = backend, check_finite
        self._specs = {spec.name: spec for spec in backend.contract.inputs}
        self._valued = [spec for spec in backend.contract.inputs if spec.value is not msgspec.UNSET]
        self._fixed: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = []  # for `are_converted`

    def fix(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Remember the shapes of all further steps, which `are_converted` compares."""
        self._fixed = [(name, shapes[name], _DTYPES[spec.dtype]) for name, spec in self._specs.items()]

    def free(self) -> None:
        """Forget the shapes; `are_converted` returns False until they are fixed again."""
        self._fixed = []

    def are_converted(self, inputs: Mapping[str, Any]) -> TypeGuard[Mapping[str, NDArray[Any]]]:
        """Whether all inputs are numpy arrays of the fixed shapes and dtypes, so that they need no other check.

        This is the case in nearly every step, and between two steps the code is not in the CPU's cache: a short path
        is faster.

        Raises:
            InputError: they are, and one of them holds NaN or Inf.
        """
        if len(inputs) != len(self._fixed):
            return False
        for name, shape, dtype in self._fixed:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.shape != shape or array.dtype != dtype:
                return False
            if not array.flags.c_contiguous:
                return False
        if self.check_finite:
            for name, array in inputs.items():
                require_finite(name, array)
        return bool(self._fixed)

    def complete(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs, with the contract's values for those that are left out.

        Raises:
            InputError: an input that gives the size of one that is left out does not fit the contract.
        """
        missing = [spec for spec in self._valued if spec.name not in inputs]
        if not missing:
            return inputs
        free = any(symbols_of(spec.shape) for spec in missing)
        given = inputs.keys() & self._specs.keys() if free else set()
        symbols = bind((name, self._specs[name].shape, np.shape(inputs[name])) for name in given)
        return {**inputs, **{spec.name: spec.filled(resolve(spec.shape, symbols)) for spec in missing}}

    def convert(self, inputs: Mapping[str, ArrayLike | OnDevice]) -> dict[str, NDArray[Any] | DeviceArray]:
        """The inputs of a whole batch, by name.

        Raises:
            InputError: a name, dtype or value that does not fit.
        """
        self._require_names(inputs)
        arrays = {name: self._array(spec, inputs[name]) for name, spec in self._specs.items()}
        if self.check_finite:
            for name, array in arrays.items():
                if not isinstance(array, DeviceArray):
                    require_finite(name, array)
        return arrays

    def convert_slot(self, slot: Slot, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """The inputs of one slot, by name.

        Raises:
            InputError: as for `convert`, with the name of the slot.
        """
        try:
            inputs = self.complete(inputs)
            self._require_names(inputs)
            return {name: as_input(spec, inputs[name]) for name, spec in self._specs.items()}
        except InputError as error:
            raise InputError(f"slot {slot.name}: {error.message}", hint=error.hint) from error

    def require_finite_slots(
        self, batch: Mapping[str, NDArray[Any]] | None, frames: Mapping[Slot, Mapping[str, NDArray[Any]]]
    ) -> None:
        """Check frames for NaN and Inf.

        Args:
            batch: if every row has a frame, it is checked at once, and the slots only to name the one that has them.
            frames: inputs of each slot.
        """
        if not self.check_finite:
            return
        try:
            for name, array in (batch or {}).items():
                require_finite(name, array)
            checked = batch is not None
        except InputError:
            checked = False
        if not checked:
            for slot, arrays in frames.items():
                for name, array in arrays.items():
                    require_finite(f"slot {slot.name}: {name}", array)

    def _array(self, spec: TensorSpec, value: Any) -> NDArray[Any] | DeviceArray:
        if type(value) is np.ndarray or not is_on_device(value):
            return as_input(spec, value)
        stream = self._backend.input_stream
        if stream is None:
            raise InputError(
                f"{spec.name}: expected an array on the CPU, where the model runs, got one on a GPU",
                hint="x.cpu(), or open the model on the GPU: StepLoop.open(..., device='cuda')",
            )
        return read_device_array(spec, value, stream=stream, device=Device.parse(self._backend.device).index)

    def _require_names(self, inputs: Mapping[str, Any]) -> None:
        if inputs.keys() != self._specs.keys():
            raise InputError(f"step: expected inputs {', '.join(self._specs)}, got {', '.join(inputs) or 'none'}")


def as_input(spec: TensorSpec, value: ArrayLike) -> NDArray[Any]:
    """`value` as a C-contiguous array of the contract's dtype; the same object if it is one already.

    Raises:
        InputError: it is not an array on the CPU, or has a dtype that is not converted implicitly.
    """
    array = value if type(value) is np.ndarray else _as_array(spec, value)
    wanted = _DTYPES[spec.dtype]
    if array.dtype != wanted:
        both_float = array.dtype.kind == wanted.kind == "f"
        if not both_float and not (wanted.kind != "f" and np.can_cast(array.dtype, wanted, "safe")):
            raise InputError(f"{spec.name}: expected {spec.dtype}, got {array.dtype}", hint=_hint(spec, array))
        with np.errstate(over="ignore"):  # a value beyond float16 becomes Inf, which `require_finite` reports
            array = array.astype(wanted)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def require_finite(name: str, array: NDArray[Any]) -> None:
    """Raise InputError where a float array holds NaN or Inf."""
    if array.dtype.kind != "f":
        return
    # If the sum of squares is finite, so is every value; if not, the sum may have overflowed. A sum of float16 is slow.
    if array.size <= _MAX_DOT and array.itemsize > 2 and math.isfinite(np.vdot(array, array)):
        return
    if not np.isfinite(array).all():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise InputError(
            f"{name}: {bad} of {array.size} values are NaN or Inf as {array.dtype}; a state would keep them for ever",
            hint="clean the frame; StepLoop.open(..., check_finite=False) turns this check off",
        )


def _as_array(spec: TensorSpec, value: Any) -> NDArray[Any]:
    try:
        if hasattr(value, "__array__") or not hasattr(value, "__dlpack__"):
            return np.asarray(value)
        return np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(
            f"{spec.name}: expected an array that numpy can read, got {type(value).__name__}: {error}",
            hint="a tensor with gradients is detached first: x.detach()",
        ) from error


def _hint(spec: TensorSpec, array: NDArray[Any]) -> str:
    if spec.dtype.startswith("float") and array.dtype == np.uint8 and spec.range is not None:
        low, high = spec.range
        scaled = "frame.astype('float32') / 255"
        scaled += f" * {high - low:g}" if high - low != 1 else ""
        scaled += f" + {low:g}" if low else ""
        scaled += ", then the contract's mean and std per channel" if spec.mean or spec.std else ""
        scaled += ", channels in the order BGR" if spec.channels == "BGR" else ""
        return f"scale pixels to the model's range {low:g} to {high:g} first: {scaled}"
    if spec.dtype.startswith("float"):
        return "scale to the model's range and convert first: array.astype('float32')"
    return f"convert first: array.astype({spec.dtype!r})"
