"""Operators that move elements: concatenation, parts, shapes, padding, resizing."""

from __future__ import annotations

from stepcell.runtime.backends.ncnn.graph import Graph, NotConvertible, Parameter, sizes
from stepcell.runtime.backends.ncnn.operators.registry import Node, axis_of, writes

__all__: list[str] = []

# Orders of axes, as ncnn numbers them: the axes of the input in the order of the result.
_ORDERS: dict[int, list[tuple[int, ...]]] = {
    2: [(0, 1), (1, 0)],
    3: [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)],
}


@writes("Concat", moves=True)
def concat(node: Node, graph: Graph) -> None:
    axis = axis_of(node, node.get("axis"), len(graph.shape(node.outputs[0])) + 1)
    graph.layer("Concat", node.inputs, node.outputs, {0: axis})


@writes("Split", moves=True)
def split(node: Node, graph: Graph) -> None:
    rank = len(graph.shape(node.inputs[0])) + 1
    axis = axis_of(node, node.get("axis", 0), rank)
    parts = [graph.shape(name)[axis] for name in node.outputs]
    graph.layer("Slice", node.inputs[:1], node.outputs, {0: parts, 1: axis})


@writes("Slice", moves=True)
def crop(node: Node, graph: Graph) -> None:
    rank = len(graph.shape(node.inputs[0])) + 1
    starts = node.integers(graph, "starts", 1) or []
    axes = node.integers(graph, "axes", 3) or list(range(len(starts)))
    if any(step != 1 for step in node.integers(graph, "steps", 4) or []):
        raise NotConvertible(f"{node}: with steps")
    sizes_out, size_in = graph.shape(node.outputs[0]), graph.shape(node.inputs[0])
    begin, end, which = [], [], []
    for start, axis in zip(starts, axes, strict=True):
        place = axis_of(node, axis, rank)
        first = min(start + size_in[place] if start < 0 else start, size_in[place])
        begin.append(max(first, 0))
        end.append(begin[-1] + sizes_out[place])
        which.append(place)
    graph.layer("Crop", node.inputs[:1], node.outputs, {9: begin, 10: end, 11: which})


@writes("Reshape", "Flatten", "Squeeze", "Unsqueeze", moves=True)
def reshape(node: Node, graph: Graph) -> None:
    graph.layer("Reshape", node.inputs[:1], node.outputs, sizes(graph.shape(node.outputs[0]) or (1,)))


@writes("Transpose", moves=True)
def transpose(node: Node, graph: Graph) -> None:
    rank = len(graph.shape(node.inputs[0])) + 1
    order = node.get("perm", list(range(rank))[::-1])
    found = tuple(axis_of(node, axis, rank) for axis in order[1:])
    if order[0] != 0 or rank - 1 not in _ORDERS:
        raise NotConvertible(f"{node}: axes in the order {order}")
    graph.layer("Permute", node.inputs, node.outputs, {0: _ORDERS[rank - 1].index(found)})


@writes("Pad", moves=True)
def pad(node: Node, graph: Graph) -> None:
    shape = graph.shape(node.inputs[0])
    modes = {"constant": 0, "edge": 1, "reflect": 2}
    mode = node.get("mode", "constant")
    pads = node.integers(graph, "pads", 1) or []
    rank, half = len(shape) + 1, len(pads) // 2
    axes = node.integers(graph, "axes", 3) or list(range(half))
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + half]
    if mode not in modes or len(shape) != 3 or any((before + after)[at] for at in (0, 1, rank, rank + 1)):
        raise NotConvertible(f"{node}: expected height and width to be padded")
    if min(pads) < 0:
        raise NotConvertible(f"{node}: with negative padding")
    value = node.weights(graph, 2).item() if node.input(2) else node.get("value", 0.0)
    parameters: dict[int, Parameter] = {0: before[2], 1: after[2], 2: before[3], 3: after[3], 4: modes[mode]}
    graph.layer("Padding", node.inputs[:1], node.outputs, {**parameters, 5: float(value)})


@writes("Resize")
def resize(node: Node, graph: Graph) -> None:
    shape, result = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    mode = node.get("mode", "nearest")
    place = node.get("coordinate_transformation_mode", "half_pixel")
    if len(shape) != 3 or shape[0] != result[0] or node.get("antialias", 0):
        raise NotConvertible(f"{node}: expected height and width to be resized")
    parameters: dict[int, Parameter] = {3: result[1], 4: result[2]}
    rounding = node.get("nearest_mode", "round_prefer_floor")
    whole = all(out % size == 0 for size, out in zip(shape[1:], result[1:], strict=True))
    floors = (place, rounding) == ("asymmetric", "floor")
    if mode == "nearest" and (floors or (whole and (place, rounding) == ("half_pixel", "round_prefer_floor"))):
        graph.layer("Interp", node.inputs[:1], node.outputs, {0: 1, **parameters})
    elif mode == "linear" and place in ("half_pixel", "pytorch_half_pixel", "align_corners") and min(result[1:]) > 1:
        graph.layer("Interp", node.inputs[:1], node.outputs, {0: 2, **parameters, 6: int(place == "align_corners")})
    else:
        raise NotConvertible(f"{node}: {mode}, {place}, {rounding}")


@writes("DepthToSpace", moves=True)
def depth_to_space(node: Node, graph: Graph) -> None:
    mode = {"DCR": 1, "CRD": 0}[node.get("mode", "DCR")]
    graph.layer("PixelShuffle", node.inputs, node.outputs, {0: node.get("blocksize"), 1: mode})


@writes("SpaceToDepth", moves=True)
def space_to_depth(node: Node, graph: Graph) -> None:
    graph.layer("Reorg", node.inputs, node.outputs, {0: node.get("blocksize"), 1: 1})
