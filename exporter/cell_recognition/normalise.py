"""Normalisation of a graph: constants folded, shape arithmetic removed, lists and short loops unrolled.

TorchScript writes a `chunk` of a convolution's result as a chain that computes sizes, and
`tensor_split` as a Loop that fills a list. Afterwards both are a Slice or Split with constant
bounds, as the newer exporter writes them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir.passes.common as common
from onnxscript import ir, optimizer
from onnxscript.rewriter import RewriteRuleSet, pattern

from stepcell.exporter.cell_recognition.values import integers, is_float_cast
from stepcell.exporter.quiet import errors_only

__all__ = ["fold_constants", "normalise"]

_UNROLLED = 16  # iterations
_SHORT = 64  # elements of a list of paddings or sizes
_RESHAPE = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
_CUTS = (*_RESHAPE, "Concat", "Slice", "Split", "Cast", "CastLike")
_SELECT = (*_RESHAPE, "Gather", "Slice", "Split")


def normalise(model: ir.Model) -> None:
    """Rewrite a model in place; its inputs, outputs and results stay the same."""
    with errors_only("onnxscript", "onnx_ir"):
        _normalise(model)


def _normalise(model: ir.Model) -> None:
    fold_constants(model)
    if any(node.op_type in ("Loop", "SequenceAt") for node in model.graph):
        _unroll_loops(model.graph)
        fold_constants(model)
        _read_lists(model.graph)
        fold_constants(model)
    _LERP.apply_to_model(model)
    _drop_round_trips(model.graph)
    _lower_casts_of_inputs(model.graph)
    _raise_casts_of_outputs(model.graph)
    _store_in_order(model.graph)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.DeduplicateHashedInitializersPass(),  # two frames of zeros are one state
        common.CommonSubexpressionEliminationPass(),
    )(model)


def _store_in_order(graph: ir.Graph) -> None:
    """Copy folded weights that are views in another order: the pass that compares weights takes none."""
    for value in graph.initializers.values():
        if value.const_value is not None and not (array := value.const_value.numpy()).flags.c_contiguous:
            value.const_value = ir.tensor(np.ascontiguousarray(array), dtype=value.const_value.dtype, name=value.name)


# torch.lerp selects, element by element, the one of two equal sums with the smaller rounding error.
def _lerp(op, start, end, weight):  # type: ignore[no-untyped-def]
    difference = op.Sub(end, start)
    by_weight = op.Add(start, op.Mul(weight, difference))
    by_rest = op.Sub(end, op.Mul(difference, op.Sub(1.0, weight)))
    return op.Where(op.Less(weight, 0.5), by_weight, by_rest)


def _blend(op, start, end, weight):  # type: ignore[no-untyped-def]
    return op.Add(start, op.Mul(weight, op.Sub(end, start)))


_LERP = RewriteRuleSet([pattern.RewriteRule(_lerp, _blend)], commute=True)


def fold_constants(model: ir.Model) -> None:
    """Inline functions and compute what is constant, weights that are cut and joined included, in place."""
    optimizer.optimize_ir(model, should_fold=_hides_constant)


def _hides_constant(node: ir.Node) -> bool | None:
    """Also fold what the optimizer keeps to limit the file size: weights cut and joined, a short ConstantOfShape."""
    if node.op_type == "ConstantOfShape":
        sizes = integers(node.inputs[0])
        return True if sizes is not None and math.prod(sizes) <= _SHORT else None
    constant = all(value is None or value.const_value is not None for value in node.inputs)
    return True if node.op_type in _CUTS and not node.domain and constant else None


def _unroll_loops(graph: ir.Graph) -> None:
    """Unroll every Loop that fills a list, if it runs a constant number of times and has no early exit."""
    for loop in [node for node in graph if node.op_type == "Loop"]:
        body = loop.attributes["body"].as_graph()
        if all(node.op_type != "SequenceInsert" for node in body):
            continue
        trips, going = (v.const_value if v is not None else None for v in loop.inputs[:2])
        carried = list(loop.inputs[2:])
        ends = body.outputs[0]
        stays = ends is body.inputs[1] or (ends.const_value is not None and bool(ends.const_value.numpy()))
        starts = loop.inputs[1] is None or (going is not None and bool(going.numpy()))
        if trips is None or not starts or not (stays or _passes_on(ends, body.inputs[1])):
            continue
        count = int(trips.numpy().item())
        if count > _UNROLLED or len(loop.outputs) != len(carried):  # further outputs stack results
            continue
        for index in range(count):
            step = body.clone(allow_outer_scope_values=True)
            # a body may declare the number of the iteration as a list of one
            rank = len(body.inputs[0].shape) if body.inputs[0].shape is not None else 0
            tensor = ir.tensor([index] if rank else index, dtype=ir.DataType.INT64)
            number = ir.Value(name=f"{loop.name}/{index}", const_value=tensor)
            graph.register_initializer(number)
            actual = [number, loop.inputs[1], *carried]
            results = [actual[step.inputs.index(v)] if v in step.inputs else v for v in step.outputs[1:]]
            for formal, value in zip(step.inputs, actual, strict=True):
                if value is not None:
                    formal.replace_all_uses_with(value)
            nodes = list(step)
            step.outputs.clear()
            step.remove(nodes)
            for node in nodes:
                for output in node.outputs:
                    output.name = f"{loop.name}/{index}/{output.name}"
            for name, value in list(step.initializers.items()):
                step.initializers.pop(name)
                value.name = f"{loop.name}/{index}/{name}"
                graph.register_initializer(value)
            graph.insert_before(loop, nodes)
            carried = results
        for old, new in zip(loop.outputs, carried, strict=True):
            if new is not None:
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(loop, safe=True)
        body.outputs.clear()
        body.remove(list(body), safe=True)  # its uses of outer values would keep those alive


def _passes_on(value: ir.Value, source: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Identity" and node.inputs[0] is source


def _read_lists(graph: ir.Graph) -> None:
    """Replace an item of a list by the value that was inserted there."""
    for node in [node for node in graph if node.op_type == "SequenceAt"]:
        source, at = node.inputs[0], node.inputs[1]
        items = _items(source)
        if items is not None and at is not None and at.const_value is not None:
            node.outputs[0].replace_all_uses_with(items[int(at.const_value.numpy().item())])


def _items(value: ir.Value | None) -> list[ir.Value] | None:
    node = value.producer() if value is not None else None
    if node is None:
        return None
    match node.op_type:
        case "SequenceEmpty":
            return []
        case "SequenceConstruct":
            return [v for v in node.inputs if v is not None]
        case "SequenceInsert" if len(node.inputs) == 2:  # no position: at the end
            items, new = _items(node.inputs[0]), node.inputs[1]
            return [*items, new] if items is not None and new is not None else None
        case _:
            return None


def _drop_round_trips(graph: ir.Graph) -> None:
    """Remove chains of reshapes that end in the shape they started from."""
    for node in list(graph):
        value = node.outputs[0]
        origin = _origin(value)
        if origin is value:
            continue
        if value not in graph.outputs:
            value.replace_all_uses_with(origin)
        elif origin.producer() is None or origin in graph.outputs:  # one value has two names, and both are needed
            if node.op_type != "Identity":
                same = ir.Node("", "Identity", [origin], outputs=[ir.Value(type=value.type, shape=value.shape)])
                graph.insert_before(node, same)
                _take_place(value, same.outputs[0])
        else:
            _take_place(value, origin)


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new`, which takes its name as output of the graph."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name = old.name
    old.name = f"{name}/before"
    new.name = name


def _origin(value: ir.Value) -> ir.Value:
    """The earliest value with the same shape and the same elements in the same order."""
    origin = walked = value
    while (node := walked.producer()) is not None and _keeps_elements(node):
        before = node.inputs[0]
        assert before is not None
        if _same_shape(before, value) or (walked is value and node.op_type == "Identity"):
            origin = before
        elif walked is value and (undone := _undone(node, before)) is not None:
            origin = undone
        walked = before
    return origin


def _keeps_elements(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    if node.domain or source is None:
        return False
    match node.op_type:
        case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity":
            return True
        case "Split":
            return len(node.outputs) == 1
        case "Concat":
            return len(node.inputs) == 1
        case "Slice":
            return _same_shape(source, node.outputs[0])
        case "Gather":  # item 0 of an axis that has one
            axis = node.attributes.get_int("axis", 0)
            return integers(node.inputs[1]) == [0] and source.shape is not None and source.shape[axis] == 1
        case _:
            return False


def _lower_casts_of_inputs(graph: ir.Graph) -> None:
    """Move the cast of a graph input behind the operators that only select or reshape it.

    A state that a float16 graph converts on entry then reaches its cell in its own dtype.
    """
    lowered = set(graph.inputs)  # and what such operators make of them
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        cast = source.producer() if source is not None else None
        if source is None or node.domain or node.op_type not in _SELECT:
            continue
        if cast is not None and is_float_cast(cast) and cast.inputs[0] in lowered:
            wide = cast.inputs[0]
            assert wide is not None
            outputs = [ir.Value(name=f"{v.name}/before_cast", type=wide.type, shape=v.shape) for v in node.outputs]
            attributes = list(node.attributes.values())
            moved = ir.Node("", node.op_type, [wide, *node.inputs[1:]], attributes, outputs=outputs)
            graph.insert_before(node, moved)
            for old, new in zip(node.outputs, outputs, strict=True):
                lowered.add(new)
                narrow = ir.Value(type=old.type, shape=old.shape)
                graph.insert_before(node, ir.node("Cast", [new], {"to": int(old.dtype or 0)}, outputs=[narrow]))
                _take_place(old, narrow)
        elif source in lowered:
            lowered.update(node.outputs)


def _raise_casts_of_outputs(graph: ir.Graph) -> None:
    """Move the cast of a graph output before the operators that only stack or reshape it; the reverse on exit."""
    waiting = [value for value in graph.outputs if (node := value.producer()) is not None and is_float_cast(node)]
    for value in waiting:
        cast = value.producer()
        assert cast is not None
        node = cast.inputs[0].producer() if cast.inputs[0] is not None else None
        if node is None or node.domain or len(node.outputs) != 1 or node.op_type not in (*_RESHAPE, "Concat"):
            continue
        count = len(node.inputs) if node.op_type == "Concat" else 1
        wide = []
        for part in node.inputs[:count]:
            assert part is not None
            result = ir.Value(name=f"{part.name}/{value.name}", type=value.type, shape=part.shape)
            graph.insert_before(node, ir.node("Cast", [part], {"to": int(value.dtype or 0)}, outputs=[result]))
            wide.append(result)
        moved = ir.Value(type=value.type, shape=value.shape)
        inputs = [*wide, *node.inputs[count:]]
        graph.insert_before(node, ir.Node("", node.op_type, inputs, list(node.attributes.values()), outputs=[moved]))
        _take_place(value, moved)
        waiting += wide


def _undone(node: ir.Node, source: ir.Value) -> ir.Value | None:
    """The input of an Unsqueeze, if this node removes the new axis again; needs no shapes."""
    before = source.producer()
    if before is None or before.op_type != "Unsqueeze":
        return None
    if node.op_type == "Squeeze":
        axes = _axes(node)
    elif node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].shape == ():
        axes = [node.attributes.get_int("axis", 0)]
    else:
        return None
    return before.inputs[0] if axes is not None and axes == _axes(before) else None


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a Squeeze or Unsqueeze; an attribute before opset 13."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return integers(node.inputs[1]) if len(node.inputs) > 1 else None


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Every size is known, as a number or as the same symbol, and equal."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    sizes = [size if isinstance(size, int) else size.value for size in a.shape]
    return None not in sizes and sizes == [size if isinstance(size, int) else size.value for size in b.shape]
