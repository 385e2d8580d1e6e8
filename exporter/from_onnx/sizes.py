"""The shapes of an adopted file's contract: every size a number or an expression of the inputs' symbols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stepcell.contract import TensorSpec
from stepcell.dims import Dim, evaluate, symbols_of
from stepcell.errors import ContractError, ExportError
from stepcell.exporter.from_onnx.fit import Rule, rules, telling_size
from stepcell.exporter.from_onnx.foreign import Foreign
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.from_onnx.ports import Port
from stepcell.exporter.from_onnx.probe import Partial, Prober, Sample
from stepcell.exporter.from_onnx.symbols import checked_shapes, name_sizes
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.shapes import format_shapes

__all__ = ["Sizes", "find_sizes"]

_SAMPLES = 2
_SAMPLES_TO_DERIVE = 5
_SAMPLES_AT_MOST = 40
_LARGER = 16
_REFUSED = 6  # sizes in a row that tell rules apart and are no sizes of the model


@dataclass(frozen=True)
class Sizes:
    """What was found.

    Attributes:
        shapes: of every input and output, by its name in the file.
        samples: sizes at which the file runs, at least one; small ones first.
        example: sizes nearer to those of a camera, where the file runs there too.
    """

    shapes: dict[str, tuple[Dim, ...]]
    samples: list[Sample]
    example: dict[str, int]


def find_sizes(file: Foreign, run: OnnxSession, pairs: Sequence[Pair], given: Mapping[str, Sequence[int]]) -> Sizes:
    """Name the dynamic sizes of the data inputs and derive all others from them.

    Args:
        given: shapes by input; the sizes they give are fixed.

    Raises:
        UsageError: a shape in `given` does not fit.
        ExportError: the file runs at no size that was tried, or a size cannot be derived; the hint
            says which shapes to give.
    """
    fixed = checked_shapes(file.inputs, given)
    names = {pair.input for pair in pairs}
    declared, data = name_sizes([port for port in file.inputs if port.name not in names], fixed)
    states = [port for port in file.inputs if port.name in names]
    for port in states:
        if port.shape == ():
            raise ExportError(
                f"{file.path}: {port.name}: a state needs an axis that counts streams, got a number without axes",
                hint=f"give it one in the model, or keep it outside: --state {port.name}=",
            )
    for trusted in (True, False):
        # A name on a state and on a data input usually means one size; some files repeat a name for several.
        partial: Partial = {
            port.name: _state_shape(port, declared if trusted else {}, fixed.get(port.name)) for port in states
        }
        whole = all(None not in shape for shape in partial.values()) and all(
            map(_is_known, file.outputs, [declared] * len(file.outputs))
        )
        prober = Prober(file, run, data, partial, pairs)
        samples = prober.samples(_SAMPLES if whole else _SAMPLES_TO_DERIVE)
        if samples:
            break
    else:
        example = ",".join(
            f"{spec.name}:{'x'.join('?' if isinstance(d, str) else str(d) for d in spec.shape)}"
            for spec in data
            if spec.shape
        )
        raise ExportError(
            f"{file.path}: runs at none of the sizes that were tried",
            hint=f"give sizes that it takes: --shape {example}",
        )
    hints = {name: list(shape) for name, shape in partial.items()}
    for port in file.outputs:
        hints[port.name] = list(_state_shape(port, declared, None, rank=len(samples[0].shapes[port.name])))
    found = _tell_apart(prober, hints, data, samples)
    shapes: dict[str, tuple[Dim, ...]] = {spec.name: spec.shape for spec in data}
    shapes |= {name: tuple(_simplest(file, name, rows, data, samples)) for name, rows in found.items()}
    first = samples[0].symbols
    batches = {spec.shape[0] for spec in data if spec.shape}
    large = {symbol: size if symbol in batches else size * _LARGER for symbol, size in first.items()}
    return Sizes(shapes, samples, large if prober.at(large) else first)


def _state_shape(
    port: Port, declared: Mapping[str, Dim], fixed: Sequence[int] | None, *, rank: int | None = None
) -> tuple[Dim | None, ...]:
    if fixed is not None:
        return tuple(fixed)
    if port.shape is None or (rank is not None and rank != len(port.shape)):
        if rank is None:
            raise ExportError(
                f"{port.name}: the file does not say its rank", hint=f"give it: --shape {port.name}:1x8x16x16"
            )
        return (None,) * rank
    return tuple(_known(dim, declared) for dim in port.shape)


def _known(dim: int | str | None, declared: Mapping[str, Dim]) -> Dim | None:
    """A size as the file says it: a number, a name that a data input has, or an expression of such names."""
    if not isinstance(dim, str) or dim in declared:
        return declared[dim] if isinstance(dim, str) else dim
    try:
        plain = all(declared.get(symbol) == symbol for symbol in symbols_of([dim]))
        evaluate(dim, dict.fromkeys(symbols_of([dim]), 1))
    except (ContractError, RecursionError):
        return None
    return dim if plain else None


def _is_known(port: Port, declared: Mapping[str, Dim]) -> bool:
    return port.shape is not None and all(_known(dim, declared) is not None for dim in port.shape)


def _tell_apart(
    prober: Prober, hints: Mapping[str, Sequence[Dim | None]], data: Sequence[TensorSpec], samples: list[Sample]
) -> dict[str, list[list[Rule]]]:
    """The rules for every axis; while several fit one, the file is run at a size where they differ.

    `samples` grows. Sizes that the file does not take leave the simplest rule in place.
    """
    refused: set[tuple[str, int]] = set()
    found = {name: _rules(name, dims, data, samples) for name, dims in hints.items()}
    while True:
        open_sizes = (size for rows in found.values() for row in rows if len(row) > 1 for size in telling_size(row))
        telling = next((size for size in open_sizes if size not in refused), None)
        if telling is None or len(refused) > _REFUSED or len(samples) > _SAMPLES_AT_MOST:
            return found
        sample = prober.at({**samples[0].symbols, telling[0]: telling[1]})
        if sample is None:
            refused.add(telling)
            continue
        samples.append(sample)
        for name, rows in found.items():
            kept = [[r for r in row if r.at(sample.symbols) == sample.shapes[name][i]] for i, row in enumerate(rows)]
            found[name] = kept if all(kept) else _rules(name, hints[name], data, samples)


def _rules(
    name: str, hints: Sequence[Dim | None], data: Sequence[TensorSpec], samples: Sequence[Sample]
) -> list[list[Rule]]:
    symbols = [sample.symbols for sample in samples]
    found = []
    for axis, hint in enumerate(hints):
        values = [sample.shapes[name][axis] for sample in samples]
        if hint is not None and values == [evaluate(hint, each) for each in symbols]:
            found.append([Rule(None, known=hint)])
        else:
            found.append(rules(values, symbols, _preferred(hint, axis - len(hints), data)))
    return found


def _simplest(
    file: Foreign, name: str, found: Sequence[Sequence[Rule]], data: Sequence[TensorSpec], samples: Sequence[Sample]
) -> Iterator[Dim]:
    for axis, row in enumerate(found):
        if not row:
            shapes = {spec.name: samples[0].shapes[spec.name] for spec in data if spec.shape}
            seen = ", ".join(f"{sample.shapes[name][axis]} at {sample.symbols}" for sample in samples[:3])
            raise ExportError(
                f"{file.path}: {name}: no rule was found for the size of axis {axis}: it is {seen}",
                hint=f"fix the sizes, such as --shape {format_shapes(shapes)}",
            )
        yield row[0].dim


def _preferred(hint: Dim | None, from_end: int, data: Sequence[TensorSpec]) -> list[str]:
    """Symbols by how likely they are: as the file says, those of the same axis, the others."""
    same = [s.shape[from_end] for s in data if -from_end <= len(s.shape)]
    return symbols_of([*([hint] if isinstance(hint, str) else []), *same, *(dim for s in data for dim in s.shape)])
