"""Values for inputs that steer a model, such as a ratio or a rate: baked in as constants, or kept as defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from stepcell.contract import DType
from stepcell.errors import UsageError
from stepcell.exporter.from_onnx.onnx_file import OnnxFile, Port

__all__ = ["Number", "bake", "checked_values"]

Number = float | int | bool


def bake(file: OnnxFile, constants: Mapping[str, Sequence[Number]]) -> OnnxFile:
    """The file with inputs replaced by constants.

    Args:
        constants: by input its values in C order, or one number that fills it.

    Raises:
        UsageError: no such input, or values that do not fit it.
    """
    if not constants:
        return file
    values = checked_values(file.inputs, constants, option="--constant")
    model = onnx.ModelProto.FromString(file.data)
    ports = {port.name: port for port in file.inputs}
    for name, numbers in values.items():
        shape = [size if isinstance(size, int) else 1 for size in ports[name].shape or ()]  # 1 fits any other size
        array = np.array(numbers, ports[name].dtype)
        array = array.reshape(shape) if array.size == np.prod(shape) else np.full(shape, array[0])
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    kept = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in model.graph.input if v.name not in values]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    inputs = [port for port in file.inputs if port.name not in values]
    return replace(file, data=model.SerializeToString(), model=model, inputs=inputs)


def checked_values(
    inputs: Sequence[Port], given: Mapping[str, Sequence[Number]], *, option: str
) -> dict[str, tuple[Number, ...]]:
    """The values by input, as its dtype has them.

    Raises:
        UsageError: no such input, too few or too many values, or one that its dtype does not have.
    """
    ports = {port.name: port for port in inputs}
    found = {}
    for name, numbers in given.items():
        if name not in ports:
            raise UsageError(f"{option} {name}: no such input", hint=f"inputs: {', '.join(ports)}")
        shape = ports[name].shape
        sizes = [size for size in shape or () if isinstance(size, int)]
        whole = shape is not None and len(sizes) == len(shape)
        if len(numbers) != 1 and not (whole and len(numbers) == np.prod(sizes)):
            wanted = f"1 or {np.prod(sizes, dtype=int)}" if whole and np.prod(sizes) != 1 else "1"
            raise UsageError(f"{option} {name}: {wanted} number{'s' * (wanted != '1')} expected, got {len(numbers)}")
        found[name] = tuple(_as(ports[name].dtype, number, f"{option} {name}") for number in numbers)
    return found


def _as(dtype: DType, number: Number, subject: str) -> Number:
    array = np.array(number)
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
    kind = cast.dtype.kind
    fits = np.isfinite(cast) if kind == "f" else cast == array
    if not fits:
        raise UsageError(f"{subject}: expected a value of {dtype}, got {number}")
    return bool(cast) if kind == "b" else float(number) if kind == "f" else int(cast)
