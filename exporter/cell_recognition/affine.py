"""What enters a gate, as a sum of convolutions over values of the graph.

A pre-activation is walked back through convolutions, sums, concatenations and channel ranges to
the values it is made of. Each value s gets one kernel: `sum_s W_s * s + b`, with zero "same"
padding and odd kernels. Whatever is not exactly that stays a value of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.constants import Array, floats
from stepcell.exporter.cell_recognition.convolution import dense_kernel, is_dilated, pad_kernel, unlike_a_cell
from stepcell.exporter.cell_recognition.layout import channel_range, is_float_cast

__all__ = ["COMPOSED", "CONTEXT", "DILATED", "Affine", "AffineReader"]

COMPOSED = "depthwise and pointwise convolutions multiplied"
DILATED = "dilated kernel filled up with zeros"
CONTEXT = "context maps as input channels"


@dataclass(frozen=True, eq=False)
class Affine:
    """`sum_s W_s * s + b`.

    Attributes:
        kernels: W_s of every source, float64 [C, C_s, kh, kw] with odd kh and kw.
        bias: b, float64 [C].
        maps: sources that are added as they are, with no convolution on the way.
        notes: transformations of weights that this needed.
    """

    kernels: Mapping[ir.Value, Array]
    bias: Array
    maps: frozenset[ir.Value] = frozenset()
    notes: frozenset[str] = frozenset()

    @property
    def channels(self) -> int:
        return len(self.bias)

    def rows(self, start: int, stop: int) -> Affine:
        """A range of the channels; sources with no part in it are dropped."""
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

    def scaled(self, factor: Array) -> Affine:
        """Every channel times its factor [C]."""
        kernels = {s: w * factor[:, None, None, None] for s, w in self.kernels.items()}
        return Affine(kernels, self.bias * factor, self.maps, self.notes)


@dataclass
class AffineReader:
    """Reads pre-activations of one cell.

    Attributes:
        through: whether a value that a convolution reads is taken apart into the sum that made it;
            True for what depends on the hidden state. Everything else is an input of the cell.
        refused: why a convolution could not be taken in, by its result.
    """

    through: Callable[[ir.Value], bool]
    refused: dict[ir.Value, str] = field(default_factory=dict)
    _widths: dict[ir.Value, int] = field(default_factory=dict)

    def read(self, value: ir.Value) -> Affine:
        """The sum that makes a pre-activation [N, C, H, W].

        Raises:
            ValueError: the number of channels of a value is not known.
        """
        return self._read(value, lambda _: True)

    def _read(self, value: ir.Value, through: Callable[[ir.Value], bool]) -> Affine:
        node = value.producer()
        if node is None or node.domain:
            return self._source(value)
        inputs = [v for v in node.inputs if v is not None]
        match node.op_type:
            case "Identity":
                return self._read(inputs[0], through)
            case "Cast" if is_float_cast(node):
                inner = self._read(inputs[0], through)
                return self._source(value) if inputs[0] in inner.kernels else inner
            case "Concat" if node.attributes.get_int("axis") in (1, -3):
                return _stacked([self._read(v, through) for v in inputs])
            case "Split" | "Slice" if (selected := channel_range(value)) is not None:
                inner = self._read(selected[0], through)
                return self._source(value) if selected[0] in inner.kernels else inner.rows(*selected[1:])
            case "Conv" | "Add" | "Sub" | "Neg" | "Mul" | "Div" if through(value):
                return self._linear(node, value, inputs, through) or self._source(value)
            case _:
                return self._source(value)

    def _linear(
        self, node: ir.Node, value: ir.Value, inputs: list[ir.Value], through: Callable[[ir.Value], bool]
    ) -> Affine | None:
        match node.op_type:
            case "Conv":
                return self._conv(node, value)
            case "Neg":
                inner = self._read(inputs[0], through)
                return inner.scaled(-np.ones(inner.channels))
            case "Add" | "Sub":
                return self._sum(inputs[0], inputs[1], -1.0 if node.op_type == "Sub" else 1.0, through)
            case _:
                a, b = inputs
                if node.op_type == "Mul" and a.const_value is not None:
                    a, b = b, a
                if b.const_value is None:
                    return None
                inner = self._read(a, through)
                factor = _per_channel(b, inner.channels)
                if factor is None:
                    return None
                return inner.scaled(factor if node.op_type == "Mul" else 1.0 / factor)

    def _sum(self, a: ir.Value, b: ir.Value, sign: float, through: Callable[[ir.Value], bool]) -> Affine | None:
        """`a + sign * b`, where one of the two may be a constant per channel."""
        if a.const_value is not None and b.const_value is not None:
            return None
        parts = [self._read(v, through) if v.const_value is None else None for v in (a, b)]
        channels = next(part.channels for part in parts if part is not None)
        total = Affine({}, np.zeros(channels))
        for part, operand, factor in zip(parts, (a, b), (1.0, sign), strict=True):
            if part is None:
                constant = _per_channel(operand, channels)
                if constant is None:
                    return None
                part = Affine({}, constant)
            if part.channels != channels:
                return None
            total = total.plus(part.scaled(np.full(channels, factor)))
        return total

    def _conv(self, node: ir.Node, value: ir.Value) -> Affine | None:
        x, weight, bias = (*node.inputs, None)[:3]
        assert x is not None
        assert weight is not None
        reason = unlike_a_cell(node)
        if reason is not None:
            self.refused[value] = reason
            return None
        outer = dense_kernel(node)
        self._learn_width(x, outer.shape[1])
        notes = frozenset({DILATED}) if is_dilated(node) else frozenset()
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
        if inner.maps != inner.kernels.keys():
            notes |= {COMPOSED}
        offset = floats(bias) if bias is not None else np.zeros(len(outer))
        return Affine(kernels, offset + outer.sum((2, 3)) @ inner.bias, notes=notes | inner.notes)

    def _source(self, value: ir.Value) -> Affine:
        """A value that is not taken apart further."""
        channels = self._width(value)
        if channels is None:
            raise ValueError(f"the number of channels of {value.name} is not known")
        return Affine({value: np.eye(channels)[:, :, None, None]}, np.zeros(channels), frozenset({value}))

    def _width(self, value: ir.Value) -> int | None:
        shape = value.shape
        known = shape[1] if shape is not None and len(shape) == 4 else None
        return known if isinstance(known, int) else self._widths.get(value)

    def _learn_width(self, value: ir.Value, channels: int) -> None:
        """What a weight says about a value, or the one part of a concatenation, of unknown width."""
        self._widths[value] = channels
        node = value.producer()
        if node is not None and node.op_type == "Concat" and node.attributes.get_int("axis") in (1, -3):
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
    """Why a convolution of a sum of convolutions is not one convolution of the same border."""
    if outer.shape[2:] == (1, 1):
        return None
    if any(kernel.shape[2:] != (1, 1) for kernel in inner.kernels.values()):
        return "two padded convolutions in a row have another border than one"
    if inner.bias.any():
        return "a bias before a padded convolution gives another border than one convolution"
    return None


def _per_channel(value: ir.Value, channels: int) -> Array | None:
    """A constant that is one number per channel, [C, 1, 1] or broadcast to it, as [C]."""
    if value.const_value is None:
        return None
    array = floats(value)
    if array.ndim > 4 or (array.ndim == 4 and array.shape[0] != 1) or any(s != 1 for s in array.shape[-2:]):
        return None
    per_channel = array.reshape(-1)
    return np.broadcast_to(per_channel, (channels,)) if per_channel.size in (1, channels) else None
