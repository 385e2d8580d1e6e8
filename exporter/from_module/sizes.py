"""Symbolic shapes of a module: rules for its sizes, found by calling it at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stepcell.dims import Dim
from stepcell.errors import ExportError
from stepcell.exporter.size_rules import rules
from stepcell.pixels import natural_layout

__all__ = ["Shapes", "symbolic_shapes"]

Measure = Callable[[Mapping[str, Sequence[int]]], list[tuple[int, ...]]]

_LETTERS = {"batch": "N", "height": "H", "width": "W"}
_ROWS = 2
_SEQUENCE = 3  # axes of a sequence of feature vectors
_MULTIPLES = (1, 2, 4, 8, 16, 32)
_FAR = 64  # a multiple of each, far enough to tell `size // 32` from a constant


@dataclass(frozen=True)
class Shapes:
    """Shapes with symbols.

    Attributes:
        inputs: by name.
        measured: measured sizes of all outputs and states.
        batch_axes: the axis of each output and state that grows with the batch; None: it has none.
        batch_grows: the module runs with batches of other sizes; if not, no axis grows.
        pad_multiple: height and width must be multiples of it.
        batch: the size of the batch.
        several: shapes of the inputs with two or more rows, where the module runs with them.
        input_axes: the axis of the batch, by input.
    """

    inputs: dict[str, tuple[Dim, ...]]
    measured: list[tuple[Dim, ...]]
    batch_axes: list[int | None]
    batch_grows: bool
    pad_multiple: int
    batch: Dim
    several: dict[str, tuple[int, ...]]
    input_axes: dict[str, int]


def symbolic_shapes(
    inputs: Mapping[str, Sequence[int]], dynamic: Sequence[str], measure: Measure, outputs: int
) -> Shapes:
    """Shapes in which the sizes listed in `dynamic` are symbols, and the others numbers.

    Args:
        inputs: example shapes; axis 0 is the batch (axis 1 of three where the states follow that one); of four, 2 and 3
            are height and width, or 1 and 2 of NHWC.
        dynamic: the sizes out of batch, height, width that are not fixed.
        measure: shapes of outputs and states for given input shapes; may raise anything.
        outputs: how many of those are outputs.

    Raises:
        ExportError: the module does not run at other sizes, or its sizes are no fixed multiple or fraction of it.
    """
    base = measure(inputs)
    batch = _batch_axis(inputs, base, measure, outputs)
    shapes: list[list[Dim]] = [list(shape) for shape in base]
    named: dict[str, list[Dim]] = {name: list(shape) for name, shape in inputs.items()}
    batch_axes: list[int | None] = [None] * len(base)
    batch_grows, multiple = False, 1
    for symbol in _LETTERS:
        if symbol != "batch" and symbol not in dynamic:
            continue
        rules = _rules(symbol, batch, inputs, base, measure)
        if symbol == "batch" and rules is not None:
            batch_grows = True
            batch_axes = [
                next((axis for axis, rule in enumerate(shape) if isinstance(rule, str)), None) for shape in rules[1]
            ]
        if symbol not in dynamic:
            continue
        if rules is None:
            raise ExportError(
                f"--dynamic {symbol}: the module does not run at other sizes, or its sizes are no fixed multiple or "
                "fraction of it",
                hint="omit it; --shape then fixes the size",
            )
        multiple = max(multiple, rules[0])
        for shape, found in zip(shapes, rules[1], strict=True):
            for axis, rule in enumerate(found):
                if isinstance(rule, str):
                    if isinstance(shape[axis], str):
                        raise ExportError(f"--dynamic {symbol}: a size follows from two symbols: {shape[axis]}, {rule}")
                    shape[axis] = rule
        for shape in named.values():
            for axis in _axes(symbol, batch, shape):
                shape[axis] = _scaled(symbol, int(shape[axis]), _size(symbol, batch, inputs))
    return Shapes(
        {name: tuple(shape) for name, shape in named.items()},
        [tuple(s) for s in shapes],
        batch_axes,
        batch_grows,
        multiple,
        next((shape[axis] for shape in named.values() for axis in _axes("batch", batch, shape)), 1),
        _resized("batch", batch, inputs, size, _ROWS)
        if batch_grows and (size := _size("batch", batch, inputs)) < _ROWS
        else {name: tuple(shape) for name, shape in inputs.items()},
        {name: _axes("batch", batch, shape)[0] for name, shape in inputs.items()},
    )


def _rules(
    symbol: str, batch: int, inputs: Mapping[str, Sequence[int]], base: Sequence[tuple[int, ...]], measure: Measure
) -> tuple[int, list[tuple[Dim, ...]]] | None:
    """The smallest multiple at which the module runs, and every measured size as a rule of the symbol."""
    size = _size(symbol, batch, inputs)
    for multiple in (1,) if symbol == "batch" else _MULTIPLES:
        if size % multiple:
            return None
        deltas = (1, 2) if symbol == "batch" else (multiple, 2 * multiple, 3 * multiple, _FAR)
        try:
            found = [base, *(measure(_resized(symbol, batch, inputs, size, size + delta)) for delta in deltas)]
        except Exception:  # the user's code may raise anything at an unsupported size
            continue
        sizes = [size, *(size + delta for delta in deltas)]
        rules = [
            tuple(_rule(symbol, sizes, values) for values in zip(*shapes, strict=True))
            for shapes in zip(*found, strict=True)
        ]
        if all(rule is not None for shape in rules for rule in shape):
            return multiple, rules  # type: ignore[return-value]
    return None


def _rule(symbol: str, sizes: Sequence[int], values: Sequence[int]) -> Dim | None:
    """A number, or an expression such as `height`, `height // 4`, `(height + 3) // 4`, `height * 2`."""
    found = rules(values, [{symbol: size} for size in sizes], [symbol])
    return found[0].dim if found else None


def _axes(symbol: str, batch: int, shape: Sequence[int | str]) -> list[int]:
    if symbol == "batch":
        return [batch if len(shape) == _SEQUENCE else 0]
    layout = natural_layout(shape) or ""
    return [layout.index(_LETTERS[symbol])] if _LETTERS[symbol] in layout else []


def _batch_axis(
    inputs: Mapping[str, Sequence[int]], base: Sequence[tuple[int, ...]], measure: Measure, outputs: int
) -> int:
    """The batch axis of inputs with three axes, (time, batch, features) or (batch, time, features): the states tell."""
    if not any(len(shape) == _SEQUENCE for shape in inputs.values()):
        return 0
    for axis in (0, 1):
        try:
            found = measure(_resized("batch", axis, inputs, 1, 2))
        except Exception:  # an axis of fixed size
            continue
        if found[outputs:] != base[outputs:]:
            return axis
    return 0


def _size(symbol: str, batch: int, inputs: Mapping[str, Sequence[int]]) -> int:
    """The value of a symbol in the first input that has it."""
    for shape in inputs.values():
        for axis in _axes(symbol, batch, shape):
            return shape[axis]
    raise ExportError(f"--dynamic {symbol}: no input has four axes (batch, channels, height, width)")


def _scaled(symbol: str, size: int, whole: int) -> Dim:
    """The size of another input as a fraction or a multiple of the symbol; fixed if it is neither."""
    if size == whole:
        return symbol
    if whole % size == 0:
        return f"{symbol} // {whole // size}"
    return f"{symbol} * {size // whole}" if size % whole == 0 else size


def _resized(
    symbol: str, batch: int, inputs: Mapping[str, Sequence[int]], whole: int, size: int
) -> dict[str, tuple[int, ...]]:
    resized = {}
    for name, shape in inputs.items():
        new = list(shape)
        for axis in _axes(symbol, batch, shape):
            if whole % new[axis] == 0:
                new[axis] = size // (whole // new[axis])
            elif new[axis] % whole == 0:
                new[axis] = size * (new[axis] // whole)
        resized[name] = tuple(new)
    return resized
