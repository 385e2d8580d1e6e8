"""Names for the dynamic sizes of data inputs, from which all other sizes follow."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence

from stepcell.contract import TensorSpec
from stepcell.dims import Dim
from stepcell.errors import ExportError, UsageError
from stepcell.exporter.from_onnx.ports import Port

__all__ = ["checked_shapes", "name_sizes"]


def checked_shapes(inputs: Sequence[Port], given: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The shapes that a user gave, by input.

    Raises:
        UsageError: one names no input, or contradicts what the file says.
    """
    by_name = {port.name: port for port in inputs}
    for name, shape in given.items():
        if name not in by_name:
            raise UsageError(f"--shape {name}: the model has no such input", hint=f"inputs: {', '.join(by_name)}")
        declared = by_name[name].shape
        if declared is not None and (
            len(declared) != len(shape)
            or any(isinstance(a, int) and a != b for a, b in zip(declared, shape, strict=True))
        ):
            raise UsageError(f"--shape {name}: expected {declared}, got {tuple(shape)}")
    return dict(given)


def name_sizes(ports: Sequence[Port], fixed: Mapping[str, Sequence[int]]) -> tuple[dict[str, Dim], list[TensorSpec]]:
    """Name the dynamic sizes of the data inputs.

    Args:
        ports: the data inputs.
        fixed: shapes by input; their sizes become numbers, and so does every size of the same name.

    Returns:
        A symbol or number for what the file calls each dynamic size, and the data inputs with them.
    """
    declared: dict[str, Dim] = {}
    for port in ports:
        for dim, size in zip(port.shape or (), fixed.get(port.name, ()), strict=False):
            if isinstance(dim, str) and declared.setdefault(dim, size) != size:
                raise UsageError(f"--shape: {dim} is {declared[dim]} and {size}")
    used = {dim for port in ports for dim in port.shape or () if isinstance(dim, str)}
    specs = []
    for port in ports:
        shape = port.shape if port.shape is not None else fixed.get(port.name)
        if shape is None:
            raise ExportError(
                f"{port.name}: the file does not say its rank", hint=f"give it: --shape {port.name}:1x3x256x256"
            )
        dims: list[Dim] = []
        for axis, dim in enumerate(shape):
            if isinstance(dim, int):
                dims.append(dim)
            elif port.name in fixed:
                dims.append(fixed[port.name][axis])
            elif dim is None:
                dims.append(_symbol(port, axis, used))
            else:
                valid = dim.isidentifier() and dim.isascii() and not keyword.iskeyword(dim)
                dims.append(declared.setdefault(dim, dim if valid else _symbol(port, axis, used)))
        image = len(dims) == 4 and port.dtype.startswith("float")
        specs.append(TensorSpec(name=port.name, shape=tuple(dims), dtype=port.dtype, layout="NCHW" if image else None))
    return declared, specs


def _symbol(port: Port, axis: int, used: set[str]) -> str:
    """A name for a dynamic size that has none: what the axis is called, with the input's name where that is taken."""
    rank = len(port.shape or ())
    if axis == 0:
        return "batch"  # one for all inputs: streams are counted by the first axis
    plain = {1: "width", 2: "height"}.get(rank - axis, f"axis{axis}") if rank == 4 else f"axis{axis}"
    stem = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in port.name)
    names = [plain] if rank == 4 and axis > 1 else []
    for name in (*names, f"{stem}_{plain}", f"size_{stem}_{plain}"):
        if name not in used and name.isidentifier() and not keyword.iskeyword(name):
            used.add(name)
            return name
    return f"size{len(used)}"
