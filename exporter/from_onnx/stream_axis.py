"""Finds the axis that counts streams, by running the file: what enters a row must come out of that row alone.

Sizes do not tell: the state of two layers for two streams has two axes of size 2, and a state may have no such axis.
So rows of inputs and states are replaced, and all others must stay as they are, bit by bit. Rows that are
independent but not treated alike, such as channels with a filter each, are no streams: with the rows in another
order, the results must be those rows in that order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepcell.dims import Dim, resolve
from stepcell.errors import ExportError
from stepcell.exporter.from_onnx.onnx_file import Array, OnnxFile
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.from_onnx.sizes import Sizes
from stepcell.exporter.onnx_session import OnnxSession

__all__ = ["StreamAxes", "find_stream_axes"]

_BATCH = re.compile(r"batch|(b|n|bs)$", re.IGNORECASE)
_COUNTS = (3, 2)  # tried for a dynamic size
_WARM = 3  # steps before the test, so that states are those of a run
_COMBINATIONS = 64  # of one axis per state
_ALIKE = 1e-3  # of rows in another order, relative to the largest value: another kernel may compute a row
_IMAGE = 4  # axes from which on the second axis holds channels

Arrays = dict[str, Array]


@dataclass(frozen=True)
class StreamAxes:
    """The axis of the streams by name of an input or output in the file; None: it has none.

    Attributes:
        size: the number of streams or its symbol; None: no axis counts streams, so that the model steps one.
        only_one: symbols that the file calls dynamic, on the axis of the streams, and that run with 1 alone.
    """

    axes: Mapping[str, int | None]
    size: Dim | None
    only_one: tuple[str, ...] = ()


def find_stream_axes(file: OnnxFile, run: OnnxSession, pairs: Sequence[Pair], sizes: Sizes) -> StreamAxes:
    """Find the axes of a file whose sizes are known.

    Sizes that are likely to count streams are tested first: dynamic ones, then numbers above 1. At a size that is
    fixed at 1 there is nothing to tell apart: one row is one stream.
    """
    search = _Search(file, run, pairs, sizes)
    only_one = []
    for size in search.candidates():
        axes, ran = search.test(size)
        if axes is not None:
            return StreamAxes(axes, size)
        if not ran and isinstance(size, str):
            only_one.append(size)
    if only_one:
        return StreamAxes(search.first_axes({1, only_one[0]}), 1, (only_one[0],))
    if search.has_ones():
        return StreamAxes(search.first_axes({1}), 1)
    return StreamAxes(dict.fromkeys(sizes.shapes), None)


class _Search:
    def __init__(self, file: OnnxFile, run: OnnxSession, pairs: Sequence[Pair], sizes: Sizes) -> None:
        self._run, self._pairs, self._sizes = run, pairs, sizes
        self._dtypes = {port.name: port.dtype for port in file.inputs}
        self._states = [pair.input for pair in pairs]
        self._after = {pair.input: pair.output for pair in pairs}
        self._data = [port.name for port in file.inputs if port.name not in self._states]
        self._outputs = [port.name for port in file.outputs if port.name not in self._after.values()]

    def candidates(self) -> list[Dim]:
        """Sizes other than 1 that every state and a data input have on an axis that may count streams."""
        shapes = self._sizes.shapes
        leading = [dim for name in self._data for dim in _leading(shapes[name])]
        common = [dim for dim in leading if dim != 1 and all(self._axes(name, dim) for name in self._states)]
        named = [dim for dim in common if isinstance(dim, str) and dim.isidentifier()]
        named.sort(key=lambda name: _BATCH.match(name) is None)
        return list(dict.fromkeys([*named, *(dim for dim in common if isinstance(dim, int))])) if self._states else []

    def has_ones(self) -> bool:
        """Whether every state and a data input have an axis of size 1."""
        return all(1 in self._sizes.shapes[name] for name in self._states) and any(
            1 in self._sizes.shapes[name] for name in self._data
        )

    def first_axes(self, sizes: set[Dim]) -> dict[str, int | None]:
        """The first axis of one of these sizes, by name."""
        return {
            name: next((axis for axis, dim in enumerate(shape) if dim in sizes), None)
            for name, shape in self._sizes.shapes.items()
        }

    def test(self, size: Dim) -> tuple[dict[str, int | None] | None, bool]:
        """The axes of this size, if they count streams; and whether the file ran with several."""
        for count in _COUNTS if isinstance(size, str) else (size,):
            sample = self._sizes.samples[0]
            symbols = {**sample.symbols, size: count} if isinstance(size, str) else sample.symbols
            try:
                trial = _Trial(self, symbols, sample.scalars[0], count)
                return self._axes_in(trial, size), True
            except ExportError:  # the file does not run at this size
                continue
        return None, False

    def _axes_in(self, trial: _Trial, size: Dim) -> dict[str, int | None] | None:
        choices = [[(name, axis) for axis in self._axes(name, size)] for name in self._states]
        for combination in itertools.islice(itertools.product(*choices), _COMBINATIONS):
            states = dict(combination)
            after = {self._after[name]: axis for name, axis in states.items()}
            if not trial.is_confined(states, after):
                continue
            data = {name: next(self._confined(trial, name, size, after), None) for name in self._data}
            moved = {**states, **{name: axis for name, axis in data.items() if axis is not None}}
            if len(moved) == len(states):
                continue
            outputs = {
                name: next(
                    (axis for axis in self._axes(name, size, last=True) if trial.is_confined(moved, {name: axis})), None
                )
                for name in self._outputs
            }
            if any(outputs[name] is None and self._axes(name, size, last=True) for name in self._outputs):
                continue  # rows meet in an output
            if trial.is_alike(moved, {**after, **{n: axis for n, axis in outputs.items() if axis is not None}}):
                return {**states, **after, **data, **outputs}
        return None

    def _confined(self, trial: _Trial, name: str, size: Dim, after: Mapping[str, int]) -> Iterator[int]:
        return (axis for axis in self._axes(name, size, last=True) if trial.is_confined({name: axis}, after))

    def _axes(self, name: str, size: Dim, *, last: bool = False) -> list[int]:
        """Axes of a size; the last of several is left out where it is a number, since it holds features."""
        shape = self._sizes.shapes[name]
        stop = len(shape) if last or isinstance(size, str) or len(shape) == 1 else len(shape) - 1
        return [axis for axis, dim in enumerate(shape[:stop]) if dim == size]

    def feeds(self, symbols: Mapping[str, int], scalars: Arrays, rng: np.random.Generator) -> Arrays:
        """Inputs of a step, and states as they are after a few steps."""
        shapes = self._sizes.shapes
        states = {name: np.zeros(resolve(shapes[name], symbols), self._dtypes[name]) for name in self._states}
        for _ in range(_WARM):
            data = {
                name: _random(resolve(shapes[name], symbols), self._dtypes[name], rng) for name in self._data
            } | scalars
            results = self._run({**data, **states})
            states = {name: results[self._after[name]] for name in states}
        moved = {name: _moved(array, rng) for name, array in states.items()}
        return {**data, **moved}

    def run(self, feeds: Arrays) -> Arrays:
        return self._run(feeds)


class _Trial:
    """Runs of one set of sizes: a base, and others with some rows replaced."""

    def __init__(self, search: _Search, symbols: Mapping[str, int], scalars: Arrays, count: int) -> None:
        rng = np.random.default_rng(0)
        self._search, self._count = search, count
        self._base, self._other = (search.feeds(symbols, scalars, rng) for _ in range(2))
        self._results = search.run(self._base)

    def is_confined(self, moved: Mapping[str, int], watched: Mapping[str, int]) -> bool:
        """Whether replacing a row of `moved` leaves the other rows of `watched` as they are; axes by name."""
        for row in (0, self._count - 1):
            feeds = dict(self._base)
            for name, axis in moved.items():
                feeds[name] = feeds[name].copy()
                _row(feeds[name], axis, row)[...] = _row(self._other[name], axis, row)
            results = self._search.run(feeds)
            for name, axis in watched.items():
                now, before = (np.delete(each[name], row, axis) for each in (results, self._results))
                if not np.array_equal(now, before, equal_nan=now.dtype.kind == "f"):
                    return False
        return True

    def is_alike(self, moved: Mapping[str, int], watched: Mapping[str, int]) -> bool:
        """Whether the rows in reverse order give the results in reverse order."""
        feeds = {**self._base, **{name: np.flip(self._base[name], axis).copy() for name, axis in moved.items()}}
        results = self._search.run(feeds)
        for name, axis in watched.items():
            got, expected = (np.asarray(a, np.float64) for a in (results[name], np.flip(self._results[name], axis)))
            limit = _ALIKE * max(1e-6, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
            if not np.allclose(got, expected, rtol=0, atol=limit, equal_nan=True):
                return False
        return True


def _leading(shape: Sequence[Dim]) -> list[Dim]:
    """The sizes of a data input that may count streams: not those of features, channels, height or width."""
    if len(shape) < 2:
        return [dim for dim in shape if isinstance(dim, str)]
    return list(shape[: 2 if len(shape) in (3, _IMAGE + 1) else 1])


def _row(array: Array, axis: int, row: int) -> Array:
    return np.moveaxis(array, axis, 0)[row : row + 1]


def _random(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    if dtype.startswith("float"):
        return np.asarray(rng.uniform(-1, 1, shape), dtype)
    return np.asarray(rng.integers(0, 2, shape), dtype)


def _moved(array: Array, rng: np.random.Generator) -> Array:
    """A state off its path, so that rows which are alike become different."""
    return np.asarray(array + rng.uniform(-0.1, 0.1, array.shape), array.dtype) if array.dtype.kind == "f" else array
