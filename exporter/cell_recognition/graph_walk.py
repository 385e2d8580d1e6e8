"""Graph traversal for the recogniser: ancestors and descendants of values, obstacles, module paths."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from onnxscript import ir

__all__ = ["ancestors", "descendants", "first_kernel", "is_made_inside", "module_path", "obstacle"]

_NORMALISATION = {
    "InstanceNormalization",
    "GroupNormalization",
    "LayerNormalization",
    "BatchNormalization",
    "ReduceMean",
}
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def descendants(value: ir.Value) -> set[ir.Value]:
    """Every value that is computed from this one, and the value itself.

    Values inside the body of a Loop or If are not followed out of it.
    """
    found, waiting = {value}, [value]
    while waiting:
        for node in waiting.pop().consumers():
            new = [output for output in node.outputs if output not in found]
            found.update(new)
            waiting.extend(new)
    return found


def ancestors(value: ir.Value) -> Iterator[ir.Value]:
    """The value and what it is computed from, nearest first; sizes (Shape) are not followed."""
    found, waiting = {value}, [value]
    for current in waiting:
        yield current
        node = current.producer()
        if node is None or node.op_type in ("Shape", "Size"):
            continue
        new = [v for v in node.inputs if v is not None and v not in found]
        found.update(new)
        waiting.extend(dict.fromkeys(new))


def is_made_inside(value: ir.Value) -> bool:
    """Whether a value depends on no input of the graph, except through sizes."""
    return not any(v.is_graph_input() for v in ancestors(value))


def obstacle(source: ir.Value, refused: dict[ir.Value, str]) -> str:
    """The operation between a gate and the convolution of the state that prevents replacement, in words."""
    if source in refused:
        return refused[source]
    for value in _until_convolution(source):
        node = value.producer()
        if node is not None and node.op_type in _NORMALISATION:
            return f"normalisation ({node.op_type}) between the convolution and the gate"
    for value in _until_convolution(source):
        if value in refused:
            return refused[value]
    node = source.producer()
    return f"{node.op_type if node is not None else source.name} between the convolution of the state and the gate"


def first_kernel(values: Iterable[ir.Value]) -> tuple[int, int]:
    """The largest kernel of the convolutions that directly make these values; (1, 1) if there is none."""
    sizes = [(1, 1)]
    for value in values:
        for made in _until_convolution(value):
            node = made.producer()
            if node is not None and node.op_type == "Conv" and (weight := node.inputs[1]) is not None:
                shape = weight.shape
                if shape is not None and len(shape) == 4 and isinstance(shape[2], int) and isinstance(shape[3], int):
                    sizes.append((shape[2], shape[3]))
    return max(sizes, key=lambda size: size[0] * size[1])


def module_path(value: ir.Value) -> str:
    """The path of the module that computes a value, from the names that exporters leave; "" without any."""
    node = value.producer()
    path = ""
    if node is not None:
        try:
            scopes = json.loads(node.metadata_props.get(_SCOPES, "[]").replace("'", '"'))
        except (ValueError, RecursionError):
            scopes = []
        if isinstance(scopes, list) and len(scopes) > 1:
            path = str(scopes[-2])
        elif "/" in (node.name or ""):
            path = str(node.name).strip("/").rpartition("/")[0]
    return re.sub(r"[^0-9A-Za-z_.]+", ".", path).strip(".")


def _until_convolution(value: ir.Value) -> Iterator[ir.Value]:
    """The value and its ancestors, up to and including results of convolutions and matrix products."""
    found, waiting = {value}, [value]
    for current in waiting:
        yield current
        node = current.producer()
        if node is None or node.op_type in _PRODUCTS:
            continue
        new = [v for v in node.inputs if v is not None and v not in found and v.const_value is None]
        found.update(new)
        waiting.extend(dict.fromkeys(new))
