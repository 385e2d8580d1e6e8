"""Trial runs of a file at several sizes, for the shapes that its states and outputs have there.

Exporters write names of dynamic sizes, but not how one depends on another (a state of
Robust Video Matting is `height_1` x `width_1`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import onnx

from stepcell.contract import TensorSpec
from stepcell.dims import Dim, resolve
from stepcell.errors import ExportError
from stepcell.exporter.from_onnx.onnx_file import Array, OnnxFile
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.step_onnx.graph import set_shape
from stepcell.external_weights import tensors_of

__all__ = ["Partial", "Prober", "Sample", "is_number"]

# Batch, height, width and any other size. Small ones first, since the comparison runs at them; then
# sizes for deep pyramids and long windows. Odd sizes distinguish rounding up from rounding down.
_LADDER = (
    *((1, 16, 24, 96), (2, 24, 16, 128), (1, 32, 48, 256), (2, 48, 32, 288), (1, 23, 37, 512), (2, 96, 64, 576)),
    *((1, 128, 192, 1024), (1, 224, 288, 4096), (1, 256, 512, 16000)),
)
_ROUNDS = 3  # of feeding a state's shape back until it does not change
_VALUES = 4  # tried for an integer without axes

Partial = dict[str, tuple[Dim | None, ...]]


@dataclass(frozen=True)
class Sample:
    """One set of sizes at which the file runs.

    Attributes:
        symbols: value of every symbol of the data inputs.
        scalars: values of the integer data inputs that have one element, each set a valid one.
        shapes: shapes of every input and output, by its name in the file.
    """

    symbols: dict[str, int]
    scalars: list[dict[str, Array]]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prober:
    """Runs a file at sizes.

    Attributes:
        data: the data inputs, dynamic sizes named.
        states: shape of every state input, None where it must be found.
        failures: what ONNX Runtime said where the file did not run.
    """

    file: OnnxFile
    run: OnnxSession
    data: Sequence[TensorSpec]
    states: Partial
    pairs: Sequence[Pair]
    failures: list[str] = field(default_factory=list)

    def with_values(self, values: Mapping[str, float]) -> Prober:
        """The same with values for some numbers among the data inputs."""
        data = [msgspec.structs.replace(s, value=(values[s.name],)) if s.name in values else s for s in self.data]
        return replace(self, data=data)

    def samples(self, wanted: int) -> list[Sample]:
        """Up to `wanted` sizes at which the file runs; empty if it runs at none of those tried.

        Sizes that run with more of the scalars' values come first: each value may select another branch.
        """
        for shrink in (False, True):
            tried: list[dict[str, int]] = []
            found: list[Sample] = []
            for rung in _LADDER:
                symbols = _symbols(self.data, rung, shrink=shrink)
                best = max((len(sample.scalars) for sample in found), default=1)
                enough = sum(len(sample.scalars) == best for sample in found) >= wanted
                if symbols in tried or (enough and best == len(_scalars(self.file.model, self.data, symbols))):
                    continue
                tried.append(symbols)
                found += filter(None, [self.at(symbols)])
            if found:
                return sorted(found, key=lambda sample: -len(sample.scalars))[:wanted]
        return []

    def at(self, symbols: dict[str, int]) -> Sample | None:
        """A sample at one set of sizes, or None if the file does not run there."""
        feeds = {spec.name: _plain(spec, resolve(spec.shape, symbols)) for spec in self.data}
        valid, shapes = [], None
        for scalars in _scalars(self.file.model, self.data, symbols):
            found = self._run_at({**feeds, **scalars}, symbols)
            if found is not None:
                valid.append(scalars)
                shapes = shapes or found
        return None if shapes is None else Sample(symbols, valid, shapes)

    def _run_at(self, feeds: dict[str, Array], symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]] | None:
        """Shapes at one set of sizes, or None if the file does not run there."""
        dtypes = {port.name: port.dtype for port in self.file.inputs}
        known = {
            name: [None if d is None else resolve((d,), symbols)[0] for d in shape]
            for name, shape in self.states.items()
        }
        data = {name: array.shape for name, array in feeds.items()}
        batch = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
        for default in dict.fromkeys((1, batch)):
            shapes = _guess(self.file.model, data, known, self.pairs, default)
            for _ in range(_ROUNDS):
                zeros = {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items()}
                try:
                    results = self.run({**feeds, **zeros})
                except ExportError as error:  # these are no sizes of the model
                    self.failures.append(error.message.removeprefix(f"{self.file.path}: "))
                    break
                new = {pair.input: results[pair.output].shape for pair in self.pairs}
                if new == shapes:
                    return {**data, **shapes, **{name: array.shape for name, array in results.items()}}
                if not all(map(_fits, new.values(), (known[name] for name in new))):
                    break
                shapes = new
        return None


def is_number(spec: TensorSpec) -> bool:
    """Whether a data input is one floating-point number that no value was given for, such as a ratio."""
    return spec.dtype.startswith("float") and all(dim == 1 for dim in spec.shape) and spec.value is msgspec.UNSET


def _plain(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    return np.ones(shape, spec.dtype) if is_number(spec) else np.zeros(shape, spec.dtype)


def _symbols(data: Sequence[TensorSpec], rung: tuple[int, int, int, int], *, shrink: bool) -> dict[str, int]:
    """A value for every symbol; `shrink`: each further input is half the size, as in a feature pyramid."""
    batch, height, width, other = rung
    symbols: dict[str, int] = {}
    level = -1
    for spec in data:
        image = len(spec.shape) >= 4
        level += image
        for axis, dim in enumerate(spec.shape):
            from_end = len(spec.shape) - axis
            letter = spec.layout[axis] if spec.layout else {1: "W", 2: "H"}.get(from_end, "")
            size = batch if axis == 0 else {"W": width, "H": height}.get(letter, 1) if image else other
            if shrink and image and letter in ("W", "H"):
                size = -(-size // 2**level)
            if isinstance(dim, str):
                symbols.setdefault(dim, size)
    return symbols


def _scalars(model: onnx.ModelProto, data: Sequence[TensorSpec], symbols: Mapping[str, int]) -> list[dict[str, Array]]:
    """Values for integers of one element, such as a sampling rate: those with which the graph compares them."""
    given = {s.name: s.filled(resolve(s.shape, symbols)) for s in data if s.value is not msgspec.UNSET}
    single = [
        s
        for s in data
        if s.name not in given and not s.dtype.startswith("float") and np.prod(resolve(s.shape, symbols)) == 1
    ]
    values = {spec.name: [1, 0] if spec.dtype == "bool" else _compared_with(model, spec.name) for spec in single}
    count = max(map(len, values.values()), default=1)
    return [
        given
        | {
            spec.name: np.full(
                resolve(spec.shape, symbols), values[spec.name][index % len(values[spec.name])], spec.dtype
            )
            for spec in single
        }
        for index in range(count)
    ]


def _compared_with(model: onnx.ModelProto, name: str) -> list[int]:
    """The constants with which the graph compares an input, and 1."""
    constants = {tensor.name: tensor for tensor in tensors_of(model) if tensor.name}
    aliases, found = {name}, []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        if (
            node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Gather")
            and node.input[0] in aliases
        ):
            aliases.add(node.output[0])
        if node.op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual") and aliases & set(node.input):
            for other in node.input:
                if other in constants:
                    found += [int(value) for value in onnx.numpy_helper.to_array(constants[other]).ravel()[:_VALUES]]
    return list(dict.fromkeys([*found, 1]))[:_VALUES]


def _fits(shape: Sequence[int], known: Sequence[int | None]) -> bool:
    return len(shape) == len(known) and all(b in (None, a) for a, b in zip(shape, known, strict=True))


def _guess(
    model: onnx.ModelProto,
    data: Mapping[str, Sequence[int]],
    known: Mapping[str, Sequence[int | None]],
    pairs: Sequence[Pair],
    default: int,
) -> dict[str, tuple[int, ...]]:
    """Initial shapes of states: those that shape inference finds for their new values, else `default`."""
    if all(None not in shape for shape in known.values()):
        return {name: tuple(size or default for size in shape) for name, shape in known.items()}
    found = _inferred(model, {**data, **known})
    guess = {}
    for pair in pairs:
        shape = known[pair.input]
        after = found.get(pair.output) or [None] * len(shape)
        fitting = after if len(after) == len(shape) else [None] * len(shape)
        guess[pair.input] = tuple(size or other or default for size, other in zip(shape, fitting, strict=True))
    return guess


def _inferred(model: onnx.ModelProto, inputs: Mapping[str, Sequence[int | None]]) -> dict[str, list[int | None]]:
    """Shapes of the outputs by ONNX's shape inference, given those of the inputs."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        if value.name in inputs:
            set_shape(value, inputs[value.name])
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    del sized.graph.value_info[:]
    try:
        sized = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    return {
        value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim] for value in sized.graph.output
    }
