"""An ncnn network as it is written: layers, blobs, weights, and its text and binary form.

ncnn has no batch axis: a tensor (1, C, H, W) of the ONNX graph is a blob of C x H x W, so a *shape* here is that of the
tensor without its first axis. A blob may be read once only; blobs with more readers get a layer `Split`, which copies
nothing. Names are numbers, so that none comes from a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Graph", "Network", "NotConvertible"]

_MAGIC = 7767517
_ARRAY = 23300  # an array of parameter N has the key -(23300 + N)
_SHAPES = 30  # parameter of every layer: shapes of its outputs, by which ncnn chooses the algorithm of a convolution

Parameter = int | float | Sequence[int] | Sequence[float]


class NotConvertible(Exception):
    """What of a model ncnn cannot compute, for display."""


@dataclass(frozen=True)
class Network:
    """A converted model.

    Attributes:
        param: ncnn's text form of the layers.
        weights: ncnn's binary form of the weights.
        inputs: number of the blob of every graph input that is read.
        outputs: number of the blob of every graph output.
        shapes: shape of every graph input and output, without the axis of streams; at least one number.
    """

    param: str
    weights: bytes
    inputs: dict[str, int]
    outputs: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


@dataclass
class _Layer:
    kind: str
    inputs: list[int]
    outputs: list[int]
    parameters: Mapping[int, Parameter] = field(default_factory=dict)
    weights: Sequence[bytes] = ()

    def line(self, number: int, shapes: Mapping[int, tuple[int, ...]]) -> str:
        blobs = [str(blob) for blob in (*self.inputs, *self.outputs)]
        hints = [_hint(shapes.get(blob, ())) for blob in self.outputs]
        known = {_SHAPES: [size for hint in hints for size in hint]} if all(hints) else {}
        texts = [_text(key, value) for key, value in {**self.parameters, **known}.items()]
        return " ".join([self.kind, str(number), f"{len(self.inputs)} {len(self.outputs)}", *blobs, *texts])


class Graph:
    """A network that is being written.

    Args:
        shapes: of every tensor of the ONNX graph, all axes.
        constants: the tensors that are known, by name.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], constants: Mapping[str, NDArray[Any]]) -> None:
        self._shapes = shapes
        self._constants = constants
        self._layers: list[_Layer] = []
        self._blobs: dict[str, int] = {}  # of a tensor
        self._sizes: dict[int, tuple[int, ...]] = {}  # of a blob, as far as they are known
        self._count = 0

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a tensor, if it is known."""
        return self._constants.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that is not constant, without its first axis.

        Raises:
            NotConvertible: it is not known, or the first axis has another size than 1, or there are too many axes.
        """
        shape = tuple(self._shapes.get(name, ()))
        if not shape or shape[0] != 1 or not all(size > 0 for size in shape):
            raise NotConvertible(f"tensor {name} of shape {shape}: expected a known shape with 1 as its first size")
        if len(shape) > 5:
            raise NotConvertible(f"tensor {name} of shape {shape}: ncnn has tensors of up to 4 axes")
        return shape[1:]

    def input(self, name: str) -> int:
        """A new blob for an input of the graph."""
        blob = self._blobs[name] = self._blob(self.shape(name))
        self._layers.append(_Layer("Input", [], [blob]))
        return blob

    def alias(self, name: str, other: str) -> None:
        """A tensor that has the values of another."""
        self._blobs[name] = self._read(other)

    def layer(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        parameters: Mapping[int, Parameter] | None = None,
        weights: Sequence[bytes] = (),
    ) -> None:
        """Add a layer.

        Args:
            kind: name of the layer in ncnn.
            inputs: tensors that it reads.
            outputs: tensors that it makes.
            parameters: by ncnn's number; those left out have its default.
            weights: in the order in which the layer loads them, see `coded` and `plain`.
        """
        read = [self._read(name) for name in inputs]
        for name in outputs:
            known = name in self._shapes
            self._blobs[name] = self._blob(self.shape(name) if known else ())
        made = [self._blobs[name] for name in outputs]
        self._layers.append(_Layer(kind, read, made, parameters or {}, weights))

    def memory(self, name: str, array: NDArray[Any]) -> None:
        """A tensor with these values, of 1 to 4 axes."""
        sizes = dict(zip(_SIZES[array.ndim], array.shape[::-1], strict=True))
        self.layer("MemoryData", [], [name], sizes, [plain(array)])

    def finish(self, inputs: Mapping[str, int], outputs: Sequence[str]) -> Network:
        """The network whose results are these tensors; `inputs` are blobs of `input`."""
        results = [self._read(name) for name in outputs]
        layers, made = self._split(self._needed(set(results)), results)
        names = {blob for layer in layers for blob in layer.outputs}
        lines = [
            str(_MAGIC),
            f"{len(layers)} {len(names)}",
            *(layer.line(at, self._sizes) for at, layer in enumerate(layers)),
        ]
        order = {blob: at for at, blob in enumerate(blob for layer in layers for blob in layer.outputs)}
        return Network(
            "\n".join(lines) + "\n",
            b"".join(part for layer in layers for part in layer.weights),
            {name: order[blob] for name, blob in inputs.items() if blob in order},
            {name: order[blob] for name, blob in zip(outputs, made, strict=True)},
            {name: self.shape(name) or (1,) for name in (*inputs, *outputs)},
        )

    def _needed(self, wanted: set[int]) -> list[_Layer]:
        """The layers that these blobs depend on."""
        kept = []
        for layer in reversed(self._layers):
            if wanted.intersection(layer.outputs):
                wanted.update(layer.inputs)
                kept.append(layer)
        return kept[::-1]

    def _split(self, layers: Sequence[_Layer], results: Sequence[int]) -> tuple[list[_Layer], list[int]]:
        """The layers with a `Split` after each blob that is read more than once, and the blobs of the results."""
        readers = Counter([blob for layer in layers for blob in layer.inputs] + list(results))
        free: dict[int, list[int]] = {}
        done: list[_Layer] = []
        for layer in layers:
            layer.inputs = [free[blob].pop() for blob in layer.inputs]
            done.append(layer)
            for blob in layer.outputs:
                count = readers[blob]
                free[blob] = [blob] if count <= 1 else [self._blob(self._sizes[blob]) for _ in range(count)]
                if count > 1:
                    done.append(_Layer("Split", [blob], list(free[blob])))
        return done, [free[blob].pop() for blob in results]

    def _read(self, name: str) -> int:
        """The blob of a tensor; a constant becomes one."""
        if name not in self._blobs:
            array = self._constants.get(name)
            if array is None or array.ndim > 5 or (array.ndim > 0 and array.shape[0] != 1):
                raise NotConvertible(f"tensor {name}: a constant that ncnn cannot hold")
            self.memory(name, array.reshape(array.shape[1:] or (1,)))
        return self._blobs[name]

    def _blob(self, shape: tuple[int, ...]) -> int:
        self._count += 1
        self._sizes[self._count] = shape
        return self._count


# Parameters of MemoryData and Reshape that hold the sizes, from the last axis to the first, by the number of axes.
_SIZES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 11, 2)}


def sizes(shape: Sequence[int]) -> dict[int, Parameter]:
    """The parameters of `Reshape` for a shape of 1 to 4 axes."""
    return dict(zip(_SIZES[len(shape)], reversed(shape), strict=True))


def coded(array: NDArray[Any]) -> bytes:
    """Weights that ncnn loads with a tag for their type; 0 is float32."""
    return bytes(4) + plain(array)


def plain(array: NDArray[Any]) -> bytes:
    """Weights that ncnn loads without a tag."""
    return np.ascontiguousarray(array, "<f4").tobytes()


def _hint(shape: tuple[int, ...]) -> list[int]:
    """The shape of an output as ncnn reads it: number of axes, then width, height and channels; empty: not known."""
    return [len(shape), *shape[::-1], *[1] * (3 - len(shape))] if 1 <= len(shape) <= 3 else []


def _text(key: int, value: Parameter) -> str:
    if isinstance(value, Sequence):
        return f"{-_ARRAY - key}={','.join([str(len(value)), *map(_number, value)])}"
    return f"{key}={_number(value)}"


def _number(value: int | float) -> str:
    """Floats have a point or an exponent: ncnn tells types apart by that."""
    if not math.isfinite(value):
        raise NotConvertible(f"a parameter of {value}")
    return str(int(value)) if isinstance(value, (int, np.integer)) else f"{value:.9e}"
