"""Pre-activations of gates as sums of convolutions over values of the graph.

A pre-activation is traced back through convolutions, matrix products, sums, concatenations and
channel ranges to the values that it is computed from. Each value s gets one kernel:
`sum_s W_s * s + b`, with zero "same" padding and odd kernels. A matrix product over features
[N, F] is a 1x1 kernel. A value that is not exactly such a sum is itself a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.convolution import (
    full_kernel,
    is_dilated,
    matrix_kernel,
    obstacle_in,
    pad_kernel,
)
from stepcell.exporter.cell_recognition.values import (
    Array,
    channel_count,
    channel_range,
    floats,
    is_channel_axis,
    is_float_cast,
    rank,
)

__all__ = ["COMPOSED", "CONTEXT", "DILATED", "Affine", "AffineReader"]

COMPOSED = "depthwise and pointwise convolutions multiplied"
DILATED = "dilated kernel filled up with zeros"
CONTEXT = "context maps as input channels"

_LINEAR = {"Conv", "Gemm", "MatMul", "Add", "Sub", "Neg", "Mul", "Div"}


@dataclass(frozen=True, eq=False)
class Affine:
    """`sum_s W_s * s + b`.

    Attributes:
        kernels: W_s of every source, float64 [C, C_s, kh, kw] with odd kh and kw.
        bias: b, float64 [C].
        maps: sources that are added as they are, without a convolution.
        notes: transformations of weights that were needed.
    """

    kernels: Mapping[ir.Value, Array]
    bias: Array
    maps: frozenset[ir.Value] = frozenset()
    notes: frozenset[str] = frozenset()

    @property
    def channels(self) -> int:
        return len(self.bias)

    def rows(self, start: int, stop: int) -> Affine:
        """A range of the channels; sources that do not enter it are dropped."""
        kept = {s: w[start:stop] for s, w in self.kernels.items() if w[start:stop].any()}
        return Affine(kept, self.bias[start:stop], self.maps & kept.keys(), self.notes)

    def plus(self, other: Affine) -> Affine:
        kernels = dict(self.kernels)
        for source, kernel in other.kernels.items():
            if source in kernels:
                size = tuple(np.maximum(kernels[source].shape[2:], kernel.shape[2:]))
                kernel = pad_kernel(kernels[source], size) + pad_kernel(kernel, size)
            kernels[source] = kernel
        return Affine(kernels, self.bias + other.bias, self.maps | other.maps, self.notes | other.notes)

    def scaled(self, factor: Array | float, offset: float = 0.0) -> Affine:
        """Every channel times its factor (one number or [C]), plus an offset."""
        column = np.broadcast_to(np.asarray(factor, np.float64), (self.channels,))
        kernels = {s: w * column[:, None, None, None] for s, w in self.kernels.items()}
        return Affine(kernels, self.bias * column + offset, self.maps, self.notes)

    def without(self, *sources: ir.Value) -> Affine:
        """The same sum with some sources left out."""
        kept = {s: w for s, w in self.kernels.items() if s not in sources}
        return Affine(kept, self.bias, self.maps & kept.keys(), self.notes)


@dataclass
class AffineReader:
    """Reads pre-activations of one cell.

    Attributes:
        through: whether a value that a convolution reads is itself traced back; True for what
            depends on the hidden state. Everything else is an input of the cell.
        stops: values that are never traced back: the states of the cell.
        refused: by its result, why a convolution could not be included.
    """

    through: Callable[[ir.Value], bool]
    stops: frozenset[ir.Value] = frozenset()
    refused: dict[ir.Value, str] = field(default_factory=dict)
    _widths: dict[ir.Value, int] = field(default_factory=dict)

    def read(self, value: ir.Value) -> Affine:
        """The sum that makes a pre-activation, maps [N, C, H, W] or features [N, C].

        Raises:
            ValueError: the number of channels of a value is not known.
        """
        return self._read(value, lambda _: True)

    def _read(self, value: ir.Value, through: Callable[[ir.Value], bool]) -> Affine:
        node = value.producer()
        if node is None or node.domain or value in self.stops:
            return self._source(value)
        inputs = [v for v in node.inputs if v is not None]
        match node.op_type:
            case "Identity":
                return self._read(inputs[0], through)
            case "Cast" if is_float_cast(node):
                inner = self._read(inputs[0], through)
                return self._source(value) if inputs[0] in inner.kernels else inner
            case "Concat" if is_channel_axis(node.attributes.get_int("axis"), value):
                return _stacked([self._read(v, through) for v in inputs])
            case "Split" | "Slice" if (selected := channel_range(value)) is not None:
                inner = self._read(selected[0], through)
                return self._source(value) if selected[0] in inner.kernels else inner.rows(*selected[1:])
            case op if op in _LINEAR and through(value):
                return self._linear(node, value, inputs, through) or self._source(value)
            case _:
                return self._source(value)

    def _linear(
        self, node: ir.Node, value: ir.Value, inputs: list[ir.Value], through: Callable[[ir.Value], bool]
    ) -> Affine | None:
        match node.op_type:
            case "Conv":
                return self._conv(node, value)
            case "Gemm" | "MatMul":
                return self._matrix(node, inputs, through)
            case "Neg":
                return self._read(inputs[0], through).scaled(-1.0)
            case "Add" | "Sub":
                return self._sum(inputs[0], inputs[1], -1.0 if node.op_type == "Sub" else 1.0, through)
            case _:
                a, b = inputs
                if node.op_type == "Mul" and a.const_value is not None:
                    a, b = b, a
                if b.const_value is None:
                    return None
                inner = self._read(a, through)
                factor = _per_channel(b, inner.channels, rank(value))
                if factor is None:
                    return None
                return inner.scaled(factor if node.op_type == "Mul" else 1.0 / factor)

    def _sum(self, a: ir.Value, b: ir.Value, sign: float, through: Callable[[ir.Value], bool]) -> Affine | None:
        """`a + sign * b`, where one of the two may be a constant per channel."""
        if a.const_value is not None and b.const_value is not None:
            return None
        parts = [self._read(v, through) if v.const_value is None else None for v in (a, b)]
        channels = next(part.channels for part in parts if part is not None)
        dims = next(rank(v) for v in (a, b) if v.const_value is None)
        total = Affine({}, np.zeros(channels))
        for part, operand, factor in zip(parts, (a, b), (1.0, sign), strict=True):
            if part is None:
                constant = _per_channel(operand, channels, dims)
                if constant is None:
                    return None
                part = Affine({}, constant)
            if part.channels != channels:
                return None
            total = total.plus(part.scaled(factor))
        return total

    def _matrix(self, node: ir.Node, inputs: list[ir.Value], through: Callable[[ir.Value], bool]) -> Affine | None:
        kernel = matrix_kernel(node)
        if kernel is None:
            return None
        product = self._compose(kernel, inputs[0])
        if len(inputs) < 3:
            return product
        beta = node.attributes.get_float("beta", 1.0) or 0.0
        if inputs[2].const_value is None:
            added = self._read(inputs[2], through)
            return product.plus(added.scaled(beta)) if added.channels == product.channels else None
        bias = _per_channel(inputs[2], product.channels, 2)
        return None if bias is None else product.plus(Affine({}, beta * bias))

    def _conv(self, node: ir.Node, value: ir.Value) -> Affine | None:
        x, weight, bias = (*node.inputs, None)[:3]
        assert x is not None
        assert weight is not None
        reason = obstacle_in(node)
        if reason is not None:
            self.refused[value] = reason
            return None
        outer = full_kernel(node)
        product = self._compose(outer, x)
        notes = product.notes | ({DILATED} if is_dilated(node) else set())
        offset = floats(bias) if bias is not None else np.zeros(len(outer))
        return Affine(product.kernels, product.bias + offset, notes=notes)

    def _compose(self, outer: Array, x: ir.Value) -> Affine:
        """One convolution (or matrix product) over x, composed with the sum that x itself is."""
        self._learn_width(x, outer.shape[1])
        inner = self._read(x, self.through)
        if (reason := _inexact(outer, inner)) is not None:
            inner = self._read(x, lambda _: False)
            self.refused.update(dict.fromkeys(inner.kernels, reason))
        kernels = {}
        for source, kernel in inner.kernels.items():
            if kernel.shape[2:] == (1, 1):
                kernels[source] = np.einsum("oikl,is->oskl", outer, kernel[:, :, 0, 0])
            else:
                kernels[source] = np.einsum("oi,iskl->oskl", outer[:, :, 0, 0], kernel)
        notes = inner.notes | ({COMPOSED} if inner.maps != inner.kernels.keys() else set())
        return Affine(kernels, outer.sum((2, 3)) @ inner.bias, notes=notes)

    def _source(self, value: ir.Value) -> Affine:
        """A value that is not traced back further."""
        channels = self._width(value)
        if channels is None:
            raise ValueError(f"the number of channels of {value.name} is not known")
        return Affine({value: np.eye(channels)[:, :, None, None]}, np.zeros(channels), frozenset({value}))

    def _width(self, value: ir.Value) -> int | None:
        known = channel_count(value)
        return known if known is not None else self._widths.get(value)

    def _learn_width(self, value: ir.Value, channels: int) -> None:
        """Note the width that a weight implies for its input, or for the one part of a concatenation without one."""
        self._widths[value] = channels
        node = value.producer()
        if node is not None and node.op_type == "Concat" and is_channel_axis(node.attributes.get_int("axis"), value):
            parts = {v: self._width(v) for v in node.inputs if v is not None}
            unknown = [v for v, width in parts.items() if width is None]
            if len(unknown) == 1 and len(parts) == len(node.inputs):
                self._learn_width(unknown[0], channels - sum(width or 0 for width in parts.values()))


def _stacked(parts: list[Affine]) -> Affine:
    total = sum(part.channels for part in parts)
    stacked = Affine({}, np.zeros(total))
    start = 0
    for part in parts:
        rows = slice(start, start + part.channels)
        kernels = {}
        for source, kernel in part.kernels.items():
            kernels[source] = np.zeros((total, *kernel.shape[1:]))
            kernels[source][rows] = kernel
        bias = np.zeros(total)
        bias[rows] = part.bias
        stacked = stacked.plus(Affine(kernels, bias, part.maps, part.notes))
        start += part.channels
    return stacked


def _inexact(outer: Array, inner: Affine) -> str | None:
    """Why a convolution of a sum of convolutions is not one convolution with the same border."""
    if outer.shape[2:] == (1, 1):
        return None
    if any(kernel.shape[2:] != (1, 1) for kernel in inner.kernels.values()):
        return "two padded convolutions in a row have another border than one"
    if inner.bias.any():
        return "a bias before a padded convolution gives another border than one convolution"
    return None


def _per_channel(value: ir.Value, channels: int, dims: int) -> Array | None:
    """A constant of one number per channel, broadcast to a value of `dims` axes, as [C]."""
    if value.const_value is None:
        return None
    array = floats(value)
    if dims not in (2, 4) or array.ndim > dims:
        return None
    # axes of the value are batch, channels, and (of maps) height and width
    sizes = (1,) * (dims - array.ndim) + array.shape
    if any(size != 1 for axis, size in enumerate(sizes) if axis != 1) or sizes[1] not in (1, channels):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,))
