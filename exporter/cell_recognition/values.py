"""Properties of single graph values: constants, ranks, channel ranges, precision casts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

__all__ = [
    "Array",
    "channel_count",
    "channel_range",
    "floats",
    "integers",
    "is_channel_axis",
    "is_float_cast",
    "rank",
    "scalar",
    "uncast",
]

Array = NDArray[np.floating[Any]]

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant list (or single number) of integers; None if it is absent or not constant."""
    if value is None or value.const_value is None:
        return None
    return [int(item) for item in value.const_value.numpy().reshape(-1)]


def floats(value: ir.Value) -> Array:
    """A constant tensor in float64; the value must be constant."""
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def scalar(value: ir.Value | None) -> float | None:
    """A constant of one floating-point number, else None."""
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1 or tensor.dtype not in _FLOATS:
        return None
    return float(tensor.numpy().item())


def rank(value: ir.Value) -> int:
    """2 for features [N, C], 4 for maps [N, C, H, W]; 4 where the graph does not say."""
    return 4 if value.shape is None else len(value.shape)


def is_channel_axis(axis: int | None, value: ir.Value) -> bool:
    """Whether an axis attribute means the channels of `value`, which is axis 1 of maps and of features."""
    return axis in (1, 1 - rank(value)) and rank(value) in (2, 4)


def channel_count(value: ir.Value) -> int | None:
    """The number of channels, where it is known."""
    size = value.shape[1] if value.shape is not None and len(value.shape) in (2, 4) else None
    return size if isinstance(size, int) else None


def channel_range(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """The source, first and last + 1 channel of a Split or Slice along the channels with constant bounds."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Split", "Slice") or node.inputs[0] is None:
        return None
    whole = node.inputs[0]
    total = channel_count(whole)
    if node.op_type == "Split":
        sizes = [channel_count(v) for v in node.outputs]
        known = [size for size in sizes if size is not None]
        if not is_channel_axis(node.attributes.get_int("axis", 0), whole) or len(known) != len(sizes):
            return None
        index = node.outputs.index(value)
        return whole, sum(known[:index]), sum(known[: index + 1])
    if len(node.inputs) == 1:  # before opset 10 the bounds were attributes
        starts, ends, axes = (list(node.attributes.get_ints(name, ())) for name in ("starts", "ends", "axes"))
        steps = [1]
    else:
        starts, ends, axes, steps = (integers(v) or [] for v in (*node.inputs[1:], None, None)[:4])
        steps = [1] if len(node.inputs) < 5 else steps
    if (len(starts), len(ends), len(axes), steps) != (1, 1, 1, [1]) or total is None:
        return None
    if not is_channel_axis(axes[0], whole):
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(total)
    return whole, start, stop


def uncast(value: ir.Value) -> ir.Value:
    """The value before conversions between floating-point dtypes."""
    while (node := value.producer()) is not None and is_float_cast(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def is_float_cast(node: ir.Node) -> bool:
    """Whether a node only changes the floating-point precision; a cast to integers rounds."""
    source = node.inputs[0] if node.inputs else None
    return (
        node.op_type == "Cast"
        and source is not None
        and source.dtype in _FLOATS
        and node.attributes.get_int("to") in [dtype.value for dtype in _FLOATS]
    )
