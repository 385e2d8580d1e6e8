"""Shapes of a fused file: every size as a number or an expression of the data inputs' symbols."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from stepcell.contract import TensorSpec
from stepcell.dims import Dim, evaluate, symbols_of
from stepcell.errors import ContractError, ExportError, UsageError
from stepcell.exporter.from_onnx.input_values import Number
from stepcell.exporter.from_onnx.onnx_file import OnnxFile, Port
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.from_onnx.probe import Partial, Prober, Sample, is_number
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.size_rules import Rule, rules, telling_size
from stepcell.pixels import natural_layout
from stepcell.shapes import format_shapes

__all__ = ["Sizes", "find_sizes"]

_SAMPLES = 2
_SAMPLES_TO_DERIVE = 5
_SAMPLES_AT_MOST = 40
_LARGER = 16
_NUMBERS = (1.0, 0.5, 0.25)  # values for a number among the inputs, such as a ratio of sizes
_REFUSED = 6  # discriminating sizes at which the model did not run


@dataclass(frozen=True)
class Sizes:
    """Shapes of a file, and sizes at which it runs.

    Attributes:
        shapes: shapes of every input and output, by its name in the file.
        samples: sizes at which the file runs, at least one; small ones first.
        example: sizes closer to those of a camera, if the file runs at them.
        short: sequences of one frame, if the file runs at them: after a long one a state may have no effect left.
    """

    shapes: dict[str, tuple[Dim, ...]]
    samples: list[Sample]
    example: dict[str, int]
    short: Sample | None = None


def find_sizes(
    file: OnnxFile,
    run: OnnxSession,
    pairs: Sequence[Pair],
    given: Mapping[str, Sequence[int]],
    values: Mapping[str, tuple[Number, ...]] | None = None,
) -> Sizes:
    """Name the dynamic sizes of the data inputs and derive all others from them.

    Args:
        given: shapes by input; the sizes they give are fixed.
        values: of data inputs.

    Raises:
        UsageError: a shape in `given` does not fit, or a number among the data inputs sets sizes and has no value.
        ExportError: the file runs at none of the sizes that were tried, or a size cannot be derived;
            the hint says which shapes to give.
    """
    fixed = _checked_shapes(file.inputs, given)
    names = {pair.input for pair in pairs}
    declared, specs = _name_sizes([port for port in file.inputs if port.name not in names], fixed)
    known = values or {}
    data = [msgspec.structs.replace(s, value=known[s.name]) if s.name in known else s for s in specs]
    states = [port for port in file.inputs if port.name in names]
    for trusted in (True, False):
        # One name on a state and on a data input usually means one size; some files use a name for several sizes.
        partial: Partial = {
            port.name: _state_shape(port, declared if trusted else {}, fixed.get(port.name)) for port in states
        }
        whole = all(None not in shape for shape in partial.values()) and all(
            map(_is_known, file.outputs, [declared] * len(file.outputs))
        )
        sized = {**partial, **_from_outputs(file, pairs, partial, declared if trusted else {})}
        prober = Prober(file, run, data, sized, pairs)
        _check_numbers(prober)
        samples = prober.samples(_SAMPLES if whole else _SAMPLES_TO_DERIVE)
        if samples:
            break
    else:
        raise _runs_nowhere(prober, fixed)
    hints = {name: list(shape) for name, shape in partial.items()}
    for port in file.outputs:
        hints[port.name] = list(_state_shape(port, declared, None, rank=len(samples[0].shapes[port.name])))
    first = samples[0].symbols
    batches = {spec.shape[0] for spec in data if spec.shape}
    large = {symbol: size if symbol in batches else size * _LARGER for symbol, size in first.items()}
    at_large = prober.at(large)
    # Rules that agree at small sizes may differ at those of a camera.
    seen = [*samples, *([at_large] if at_large is not None else [])]
    found = _tell_apart(prober, hints, data, seen)
    shapes: dict[str, tuple[Dim, ...]] = {spec.name: spec.shape for spec in data}
    shapes |= {name: tuple(_simplest(file, name, rows, data, seen)) for name, rows in found.items()}
    lengths = {dim for spec in data if len(spec.shape) < 4 for dim in spec.shape[1:] if isinstance(dim, str)}
    short = prober.at({**first, **dict.fromkeys(lengths & first.keys(), 1)}) if lengths else None
    return Sizes(shapes, samples, large if at_large is not None else first, short)


def _check_numbers(prober: Prober) -> None:
    """Raise UsageError for a number among the data inputs on which sizes depend: rules hold for one value of it."""
    numbers = [spec.name for spec in prober.data if is_number(spec)]
    for name in numbers:
        others = {other: 1.0 for other in numbers if other != name}
        runs = {value: prober.with_values({**others, name: value}) for value in _NUMBERS}
        samples = {value: each.samples(1) for value, each in runs.items()}
        first = next((found[0] for found in samples.values() if found), None)
        if first is None:
            continue
        shapes = {value: each.at(first.symbols) for value, each in runs.items()}
        for end in (*(pair.output for pair in prober.pairs), *(port.name for port in prober.file.outputs)):
            seen = {value: sample.shapes[end] if sample is not None else None for value, sample in shapes.items()}
            if len(set(seen.values())) > 1:
                sizes = " and ".join(
                    f"{' x '.join(map(str, shape))} at {value:g}" if shape else f"not computed at {value:g}"
                    for value, shape in seen.items()
                )
                raise UsageError(
                    f"{prober.file.path}: {name}: sizes depend on this number: {end} is {sizes}",
                    hint=f"fix it: --constant {name}={_NUMBERS[-1]:g} (the value you use), or --value {name}="
                    f"{_NUMBERS[-1]:g} to keep it as an input that has this value where none is given",
                )


def _runs_nowhere(prober: Prober, fixed: Mapping[str, Sequence[int]]) -> ExportError:
    """The error of a file that runs at no size: what was tried, what ONNX Runtime said, what may help."""
    numbers = [spec.name for spec in prober.data if is_number(spec)]
    said = f"; at the last ones: {prober.failures[-1]}" if prober.failures else ""
    hints = [f"give the value of {name}: --constant {name}=VALUE" for name in numbers]
    free = [spec for spec in prober.data if any(isinstance(dim, str) for dim in spec.shape)]
    if free:
        shapes = {spec.name: [d if isinstance(d, int) else 256 for d in spec.shape] for spec in free}
        hints.append(f"give sizes that it takes, such as --shape {format_shapes(shapes)}")
    unknown = [port for port in prober.file.inputs if port.name in prober.states and port.name not in fixed]
    if unknown and not free:
        hints.append(
            f"give the size of the state: --shape {unknown[0].name}:{'x'.join('?' * len(unknown[0].shape or ()))}"
        )
    return ExportError(
        f"{prober.file.path}: runs at none of the sizes that were tried{said}", hint="; or ".join(hints) or None
    )


def _state_shape(
    port: Port, declared: Mapping[str, Dim], fixed: Sequence[int] | None, *, rank: int | None = None
) -> tuple[Dim | None, ...]:
    if fixed is not None:
        return tuple(fixed)
    if port.shape is None or (rank is not None and rank != len(port.shape)):
        if rank is None:
            raise ExportError(
                f"{port.name}: the file does not give its rank", hint=f"give it: --shape {port.name}:1x8x16x16"
            )
        return (None,) * rank
    return tuple(_known(dim, declared) for dim in port.shape)


def _from_outputs(file: OnnxFile, pairs: Sequence[Pair], partial: Partial, declared: Mapping[str, Dim]) -> Partial:
    """Shapes of states, unknown sizes as the file declares them for the state's next value.

    Exporters give a size of the input a name of its own, and that of the output the expression that computes it.
    """
    outputs = {port.name: port for port in file.outputs}
    found: Partial = {}
    for pair in pairs:
        shape, after = partial[pair.input], outputs[pair.output].shape
        if after is not None and len(after) == len(shape):
            found[pair.input] = tuple(
                _known(other, declared) if dim is None else dim for dim, other in zip(shape, after, strict=True)
            )
    return found


def _known(dim: int | str | None, declared: Mapping[str, Dim]) -> Dim | None:
    """A size as the file gives it: a number, a name that a data input has, or an expression of such names."""
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
    """The rules for every axis; while several fit, the file is run at sizes where they differ.

    New samples are appended to `samples`. Where the file does not run at such a size, the simplest rule is used.
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
    file: OnnxFile, name: str, found: Sequence[Sequence[Rule]], data: Sequence[TensorSpec], samples: Sequence[Sample]
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
    """Symbols in order of likelihood: the one the file names, those of the same axis, the others."""
    same = [s.shape[from_end] for s in data if -from_end <= len(s.shape)]
    return symbols_of([*([hint] if isinstance(hint, str) else []), *same, *(dim for s in data for dim in s.shape)])


def _checked_shapes(inputs: Sequence[Port], given: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
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


def _name_sizes(ports: Sequence[Port], fixed: Mapping[str, Sequence[int]]) -> tuple[dict[str, Dim], list[TensorSpec]]:
    """Name the dynamic sizes of the data inputs.

    Args:
        ports: the data inputs.
        fixed: shapes by input; their sizes become numbers, as does every size of the same name.

    Returns:
        A symbol or number for each name of a dynamic size, and the data inputs with them.
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
                f"{port.name}: the file does not give its rank", hint=f"give it: --shape {port.name}:1x3x256x256"
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
        specs.append(
            TensorSpec(name=port.name, shape=tuple(dims), dtype=port.dtype, layout=natural_layout(tuple(dims)))
        )
    return declared, specs


def _symbol(port: Port, axis: int, used: set[str]) -> str:
    """A name for an unnamed dynamic size: that of the axis, combined with the input's name where it is taken."""
    rank = len(port.shape or ())
    if axis == 0:
        return "batch"  # one for all inputs: the first axis is the batch
    letter = (natural_layout(port.shape or ()) or "." * rank)[axis]
    plain = {"W": "width", "H": "height"}.get(letter, f"axis{axis}")
    stem = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in port.name)
    names = [plain] if letter in "HW" else []
    for name in (*names, f"{stem}_{plain}", f"size_{stem}_{plain}"):
        if name not in used and name.isidentifier() and not keyword.iskeyword(name):
            used.add(name)
            return name
    return f"size{len(used)}"
