"""Values that are some channels of another one, or the same in another dtype."""

from __future__ import annotations

from onnxscript import ir

from stepcell.exporter.cell_recognition.constants import integers

__all__ = ["channel_range", "is_float_cast", "uncast"]

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def channel_range(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """Of a Split or Slice along the channels with constant bounds: what it cuts, first and last + 1."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Split", "Slice") or node.inputs[0] is None:
        return None
    whole = node.inputs[0]
    total = whole.shape[1] if whole.shape is not None and len(whole.shape) == 4 else None
    if node.op_type == "Split":
        sizes = [v.shape[1] if v.shape is not None and len(v.shape) == 4 else None for v in node.outputs]
        known = [size for size in sizes if isinstance(size, int)]
        if node.attributes.get_int("axis", 0) not in (1, -3) or len(known) != len(sizes):
            return None
        index = node.outputs.index(value)
        return whole, sum(known[:index]), sum(known[: index + 1])
    if len(node.inputs) == 1:  # before opset 10 the bounds were attributes
        starts, ends, axes = (list(node.attributes.get_ints(name, ())) for name in ("starts", "ends", "axes"))
        steps = [1]
    else:
        starts, ends, axes, steps = (integers(v) or [] for v in (*node.inputs[1:], None, None)[:4])
        steps = [1] if len(node.inputs) < 5 else steps
    if (len(starts), len(ends), steps) != (1, 1, [1]) or axes not in ([1], [-3]) or not isinstance(total, int):
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(total)
    return whole, start, stop


def uncast(value: ir.Value) -> ir.Value:
    """The value before conversions between floating-point dtypes."""
    while (node := value.producer()) is not None and is_float_cast(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def is_float_cast(node: ir.Node) -> bool:
    """Whether a node does nothing but change the floating-point precision; a cast to integers rounds."""
    source = node.inputs[0] if node.inputs else None
    return (
        node.op_type == "Cast"
        and source is not None
        and source.dtype in _FLOATS
        and node.attributes.get_int("to") in [dtype.value for dtype in _FLOATS]
    )
