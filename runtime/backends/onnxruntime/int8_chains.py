"""Chains of int8 nodes: what QuantizeLinear and DequantizeLinear say of a graph, as a CPU computes it fastest.

ONNX Runtime makes a QLinearConv of a convolution between DequantizeLinear and QuantizeLinear. Around it, activations,
concatenations and factors of channels stay in float32, and its optimiser moves the transpositions to and from channels
last to where they move four bytes a value: on the denoiser of the zoo this takes longer than the convolutions. Here a
value that has been rounded to int8 stays a tensor of bytes until a node needs floats:

    Relu            Clip of the bytes
    Concat, Split   of bytes
    a factor        part of the scale of the DequantizeLinear
    a Conv          QLinearConv with channels last, whose bytes are transposed only where something else reads them

Values are those of the graph, except that a product of scales is rounded once instead of twice. The bytes are unsigned
with a zero point of 128, since ONNX Runtime's fast convolutions on x86 take no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stepcell.optional_imports import require
from stepcell.runtime.backends.onnxruntime.graph_changes import has_bodies, replace_nodes, static_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto, TensorProto

    Array = NDArray[Any]

__all__ = ["chain_int8"]

_PREFIX = "stepcell.int8"
_ZERO = np.uint8(128)  # zero point of the bytes: int8 0
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_OPSET = 13  # the first with sizes of Split as an input, and with scales of DequantizeLinear along an axis
_BLOCK = 4  # input channels that a VNNI instruction multiplies; other numbers have no fast convolution


@dataclass
class _Bytes:
    """A tensor (batch, channels, height, width) whose values are a scale times (bytes - 128).

    Attributes:
        scale: float32, () or (channels,).
        first: name of the bytes in this layout; last: with channels last. None: not made yet; one of them is.
    """

    scale: Array
    shape: tuple[int, ...]
    first: str | None = None
    last: str | None = None


def chain_int8(model: ModelProto) -> int:
    """Replace the int8 convolutions of a model and what is between them, in place.

    Args:
        model: without functions, with fixed input sizes and weights as initializers.

    Returns:
        The number of convolutions that were replaced. ONNX Runtime must not move the transpositions of such a model.
    """
    require("onnx", extra="ort", purpose="running a model")
    if has_bodies(model.graph):
        return 0
    if max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0) < _OPSET:
        return 0
    return _Chains(model).replace()


class _Chains:
    """One pass over the nodes: what is in a chain gets new ones, and the old ones are dropped if nothing reads them."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import helper, numpy_helper

        self._graph, self._opsets = model.graph, model.opset_import
        self._make_node, self._from_array = helper.make_node, numpy_helper.from_array
        self._attribute = helper.get_attribute_value
        self._shapes = static_shapes(model)
        self._constants = {tensor.name: tensor for tensor in self._graph.initializer}
        self._to_array = numpy_helper.to_array
        self._outputs = {output.name for output in self._graph.output}
        self._writers = {name: node for node in self._graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._nodes: list[NodeProto] = []
        self._tensors: list[TensorProto] = []
        self._bytes: dict[str, _Bytes] = {}  # by name of the floats, and of the int8 tensor between Q and DQ
        self._rounded: dict[tuple[str, float], _Bytes] = {}
        self._convolutions = self._names = 0

    def replace(self) -> int:
        """Do it; the number of convolutions."""
        handlers: dict[str, Callable[[NodeProto], None]] = {
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._dequantize,
            "Conv": self._convolve,
            "Relu": self._clip,
            "Mul": self._multiply,
            "Split": self._split,
        }
        for node in list(self._graph.node):
            known = len(self._bytes)
            if node.domain in ("", "ai.onnx") and node.op_type in handlers:
                handlers[node.op_type](node)
            if len(self._bytes) == known:
                self._nodes.append(node)
        if self._convolutions:
            self._graph.initializer.extend(self._tensors)
            replace_nodes(self._graph, self._nodes)
            if all(each.domain != "com.microsoft" for each in self._opsets):
                self._opsets.add(domain="com.microsoft", version=1)
        return self._convolutions

    # What the graph says.

    def _constant(self, name: str) -> Array | None:
        return np.asarray(self._to_array(self._constants[name])) if name in self._constants else None

    def _scale(self, node: NodeProto) -> Array | None:
        """The scale of a QuantizeLinear or DequantizeLinear of a symmetric int8 tensor with one scale."""
        scale = self._constant(node.input[1])
        zero = self._constant(node.input[2]) if len(node.input) > 2 else None
        symmetric = zero is not None and zero.dtype == np.int8 and zero.size == 1 and not zero.any()
        fits = scale is not None and scale.dtype == np.float32 and scale.size == 1 and symmetric
        return scale.reshape(()) if scale is not None and fits else None

    def _rounding_scale(self, node: NodeProto) -> Array | None:
        """The scale of a QuantizeLinear whose result is only turned back to floats; None: something else."""
        shape, scale = self._shapes.get(node.input[0], ()), self._scale(node)
        if node.output[0] in self._outputs or len(shape) != 4 or not all(shape) or scale is None:
            return None
        readers = self._readers.get(node.output[0], [])
        back = all(each.op_type == "DequantizeLinear" and self._scale(each) == scale for each in readers)
        return scale if back else None

    def _weight(self, node: NodeProto) -> tuple[Array, Array] | None:
        """The int8 weights of a convolution, symmetric, and the scale of each output channel."""
        made = self._writers.get(node.input[1])
        if made is None or made.op_type != "DequantizeLinear":
            return None
        weight, scale = self._constant(made.input[0]), self._constant(made.input[1])
        zero = self._constant(made.input[2]) if len(made.input) > 2 else np.zeros(1, np.int8)
        if weight is None or weight.dtype != np.int8 or scale is None or zero is None or zero.any():
            return None
        along_outputs = scale.size == 1 or any(each.name == "axis" and each.i == 0 for each in made.attribute)
        return (weight, np.broadcast_to(scale.reshape(-1), len(weight))) if along_outputs else None

    def _bias(self, node: NodeProto) -> Array | None:
        """The bias of a convolution, which ONNX Runtime may have made int32 with a scale, as float64."""
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(1)
        made = self._writers.get(node.input[2])
        names = [node.input[2]] if made is None else list(made.input[:2])
        parts = [part.astype(np.float64) for name in names if (part := self._constant(name)) is not None]
        if len(parts) < len(names) or (made is not None and made.op_type != "DequantizeLinear"):
            return None
        return parts[0] if len(parts) == 1 else parts[0] * parts[1]

    # What becomes of its nodes: floats that are a scale times bytes get an entry, and are computed from them.

    def _quantize(self, node: NodeProto) -> None:
        scale = self._rounding_scale(node)
        if scale is not None and node.output[0] not in self._bytes:
            self._bytes[node.output[0]] = self._round(node.input[0], scale)

    def _dequantize(self, node: NodeProto) -> None:
        if node.input[0] in self._bytes:
            self._enter(node.output[0], self._bytes[node.input[0]])

    def _convolve(self, node: NodeProto) -> None:
        source, weight, bias = self._bytes.get(node.input[0]), self._weight(node), self._bias(node)
        readers = self._readers.get(node.output[0], [])
        after = readers[0] if [each.op_type for each in readers] == ["QuantizeLinear"] else None
        scale = self._rounding_scale(after) if after is not None and node.output[0] not in self._outputs else None
        if source is None or source.scale.ndim or weight is None or bias is None or after is None or scale is None:
            return
        levels, scales = weight
        shape = self._shapes[node.output[0]]
        options = {each.name: self._attribute(each) for each in node.attribute}
        x, levels = self._in_blocks(source, levels, shape, options)
        steps = np.rint(bias / (scales.astype(np.float64) * source.scale))
        inputs = [
            x, self._add(source.scale), self._add(_ZERO),
            self._add(levels), self._add(scales), self._add(np.zeros(len(levels), np.int8)),
            self._add(scale), self._add(_ZERO), self._add(np.clip(steps, -(2**31), 2**31 - 1).astype(np.int32)),
        ]  # fmt: skip
        options |= {"domain": "com.microsoft", "channels_last": 1}
        made = self._make_node("QLinearConv", inputs, [self._name()], node.name, **options)
        self._nodes.append(made)
        self._convolutions += 1
        self._bytes[after.output[0]] = _Bytes(scale, shape, last=made.output[0])

    def _in_blocks(
        self, source: _Bytes, levels: Array, output: tuple[int, ...], options: dict[str, Any]
    ) -> tuple[str, Array]:
        """Input and weights of a convolution, with a number of input channels that has a fast kernel.

        With a stride of 2, as where a network takes pictures, blocks of 2x2 pixels become channels: then 5x5 pixels are
        3x3 blocks. Otherwise channels of zeros are added. `options` are changed accordingly.
        """
        batch, channels, *size = source.shape
        if channels % _BLOCK == 0 or levels.shape[1] != channels:
            return self._last(source), levels
        blocks = _weights_of_blocks(levels, size, output[2:], options)
        if blocks is None:
            missing = -channels % _BLOCK
            zeros = self._add(np.full((batch, missing, *size), _ZERO))
            whole = self._op("Concat", [self._first(source), zeros], axis=1)
            levels = np.pad(levels, [(0, 0), (0, missing), (0, 0), (0, 0)])
            return self._op("Transpose", [whole], perm=_TO_LAST), levels
        levels, pads = blocks
        options |= {"kernel_shape": levels.shape[2:], "strides": [1, 1], "pads": pads}
        height, width = (each // 2 for each in size)
        # SpaceToDepth, of which ONNX Runtime 1.23 has none of bytes
        rows = self._reshaped(self._last(source), (batch, height, 2, width, 2 * channels))
        moved = self._op("Transpose", [rows], perm=(0, 1, 3, 2, 4))
        return self._reshaped(moved, (batch, height, width, 4 * channels)), levels

    def _clip(self, node: NodeProto) -> None:
        if (source := self._bytes.get(node.input[0])) is None or (source.scale < 0).any():
            return
        ends = [self._add(_ZERO), self._add(np.uint8(255))]
        layout = "last" if source.last else "first"
        clipped = self._op("Clip", [getattr(source, layout), *ends])
        self._enter(node.output[0], _Bytes(source.scale, source.shape, **{layout: clipped}))

    def _multiply(self, node: NodeProto) -> None:
        source, factor = self._bytes.get(node.input[0]), self._constant(node.input[1])
        if source is None or factor is None or factor.dtype != np.float32:
            return
        if factor.shape[-3:] == (source.shape[1], 1, 1) and factor.size == source.shape[1]:
            self._enter(node.output[0], replace(source, scale=source.scale * factor.reshape(-1)))

    def _split(self, node: NodeProto) -> None:
        if (source := self._bytes.get(node.input[0])) is None or not _along_channels(node):
            return
        shapes = [self._shapes[name] for name in node.output]
        names = [self._name() for _ in shapes]
        sizes = self._add(np.array([shape[1] for shape in shapes], np.int64))
        self._nodes.append(self._make_node("Split", [self._first(source), sizes], names, self._name(), axis=1))
        start = 0
        for output, name, shape in zip(node.output, names, shapes, strict=True):
            scale = source.scale[start : start + shape[1]] if source.scale.ndim else source.scale
            self._enter(output, _Bytes(scale, shape, first=name))
            start += shape[1]

    def _enter(self, name: str, found: _Bytes) -> None:
        """Floats of this name, computed from bytes where something reads them."""
        self._bytes[name] = found
        channels: dict[str, Any] = {"axis": 1} if found.scale.ndim else {}
        ends = [self._add(found.scale), self._add(np.full(found.scale.shape, _ZERO))]
        inputs = [self._first(found), *ends]
        self._nodes.append(self._make_node("DequantizeLinear", inputs, [name], self._name(), **channels))

    def _round(self, name: str, scale: Array) -> _Bytes:
        """Floats rounded to bytes, once for all that read them; those of a concatenation before it."""
        known, key = self._bytes.get(name), (name, float(scale))
        if known is not None and not known.scale.ndim and known.scale == scale:
            return known  # they are so already
        if key not in self._rounded:
            joined = self._writers.get(name)
            if joined is not None and joined.op_type == "Concat" and _along_channels(joined):
                parts = [self._round(part, scale) for part in joined.input]
                made = self._joined(parts, self._shapes[name])
            else:
                rounded = self._op("QuantizeLinear", [name, self._add(scale), self._add(_ZERO)])
                made = _Bytes(scale, self._shapes[name], first=rounded)
            self._rounded[key] = made
        return self._rounded[key]

    def _joined(self, parts: Sequence[_Bytes], shape: tuple[int, ...]) -> _Bytes:
        if any(part.last for part in parts):
            return _Bytes(parts[0].scale, shape, last=self._op("Concat", [self._last(part) for part in parts], axis=3))
        return _Bytes(parts[0].scale, shape, first=self._op("Concat", [self._first(part) for part in parts], axis=1))

    def _first(self, tensor: _Bytes) -> str:
        if tensor.first is None:
            assert tensor.last is not None
            tensor.first = self._op("Transpose", [tensor.last], perm=_TO_FIRST)
        return tensor.first

    def _last(self, tensor: _Bytes) -> str:
        if tensor.last is None:
            assert tensor.first is not None
            tensor.last = self._op("Transpose", [tensor.first], perm=_TO_LAST)
        return tensor.last

    def _reshaped(self, name: str, shape: Sequence[int]) -> str:
        return self._op("Reshape", [name, self._add(np.array(shape, np.int64))])

    def _op(self, kind: str, inputs: list[str], **options: Any) -> str:
        output = self._name()
        self._nodes.append(self._make_node(kind, inputs, [output], output, **options))
        return output

    def _add(self, value: Any) -> str:
        name = self._name()
        self._tensors.append(self._from_array(np.asarray(value), name))
        return name

    def _name(self) -> str:
        self._names += 1
        return f"{_PREFIX}.{self._names}"


def _weights_of_blocks(
    levels: Array, size: Sequence[int], output: Sequence[int], options: Mapping[str, Any]
) -> tuple[Array, list[int]] | None:
    """Weights (M, C, k, k) of a convolution of stride 2 as those (M, 4 C, k', k') of one over blocks of 2x2 pixels.

    Channels are in the order of SpaceToDepth: row in the block, column, channel of the picture.

    Returns:
        The weights and the padding; None: it is another convolution.
    """
    plain = options.get("auto_pad", b"NOTSET") == b"NOTSET" and set(options.get("dilations", [1])) == {1}
    if not plain or list(options.get("strides", [])) != [2, 2] or any(each % 2 for each in size):
        return None
    begins, ends, parts = [], [], [(0, 0), (0, 0)]
    axes = zip(size, output, options.get("pads", [0] * 4), levels.shape[2:], strict=False)
    for length, result, pad, kernel in axes:
        begins.append((pad + 1) // 2)  # blocks before the first one
        taps = (kernel - 1 - pad) // 2 + begins[-1] + 1
        ends.append(result - length // 2 - begins[-1] + taps - 1)
        front = 2 * begins[-1] - pad
        parts.append((front, 2 * taps - kernel - front))
    if min(ends) < 0:
        return None
    whole = np.pad(levels, parts)
    rows, columns = whole.shape[2] // 2, whole.shape[3] // 2
    split = whole.reshape(*levels.shape[:2], rows, 2, columns, 2).transpose(0, 3, 5, 1, 2, 4)
    return split.reshape(len(levels), -1, rows, columns), begins + ends


def _along_channels(node: NodeProto) -> bool:
    return any(each.name == "axis" and each.i == 1 for each in node.attribute)
