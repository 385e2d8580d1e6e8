"""Control flow and sequences. A subgraph gets the values it reads from the graph around it as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcell.limits import LOOP_ITERATIONS
from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.registry import Node, as_ints, register, unsupported

__all__: list[str] = []


def _if_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    body = node.bodies["then_branch" if inputs[0].item() else "else_branch"]
    _, changes = body.run_jvp(_named(node.captured, inputs[1:]), _named(node.captured, tangents[1:]))
    return tuple(changes[name] for name in body.outputs)


@register("If", jvp=_if_jvp, rounds=False, data_dependent=True)
def _if(node: Node, condition: Array, *captured: Any) -> Any:
    body = node.bodies["then_branch" if condition.item() else "else_branch"]
    results = body.run(_named(node.captured, captured))
    return tuple(results[name] for name in body.outputs)


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


def _loop_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return _iterate(node, inputs, tangents)[1]


@register("Loop", jvp=_loop_jvp, rounds=False, data_dependent=True)
def _loop(node: Node, *inputs: Any) -> Any:
    return _iterate(node, inputs, None)[0]


def _iterate(node: Node, inputs: Sequence[Any], tangents: Sequence[Any] | None) -> tuple[Any, Any]:
    """The final values of the carried variables and the stacked scan outputs, and their tangents."""
    body = node.bodies["body"]
    count = len(inputs) - len(node.captured)
    limit, condition, carried = inputs[0], inputs[1], list(inputs[2:count])
    outer = _named(node.captured, inputs[count:])
    moved: list[Any] = list(tangents[2:count]) if tangents is not None else []
    outer_moved = _named(node.captured, tangents[count:]) if tangents is not None else {}
    scans: list[list[Any]] = [[] for _ in body.outputs[1 + len(carried) :]]
    scans_moved: list[list[Any]] = [[] for _ in scans]
    changes: dict[str, Any] = {}
    step, going = 0, condition is None or bool(condition.item())
    while going and (limit is None or step < limit.item()):
        LOOP_ITERATIONS.check(step, node.op, "a loop in NumPy")
        feeds = {**outer, **_named(body.inputs, [np.array(step, np.int64), np.array(True), *carried])}  # noqa: FBT003
        if tangents is None:
            results = body.run(feeds)
        else:
            results, changes = body.run_jvp(feeds, {**outer_moved, **_named(body.inputs[2:], moved)})
        going = bool(results[body.outputs[0]].item())
        names = body.outputs[1 : 1 + len(carried)]
        carried, moved = [results[name] for name in names], [changes.get(name) for name in names]
        for place, name in enumerate(body.outputs[1 + len(carried) :]):
            scans[place].append(results[name])
            change = changes.get(name)
            scans_moved[place].append(np.zeros_like(results[name]) if change is None else change)
        step += 1
    if scans and not step:
        raise unsupported(node, "a loop without a step that has scan outputs is not implemented")
    return (
        (*carried, *(np.stack(scan) for scan in scans)),
        (*moved, *(np.stack(scan) for scan in scans_moved)),
    )


@register("SequenceEmpty", rounds=False, data_dependent=True)
def _sequence_empty(node: Node) -> list[Any]:
    return []


def _sequence_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Sequences are of the tangents what they are of the values; a part that does not change has zeros."""
    moved = [_zeros(value) if change is None else change for value, change in zip(inputs, tangents, strict=True)]
    for place, value in enumerate(inputs):
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            moved[place] = value  # a position
    return _SEQUENCE[node.op](node, *moved)


def _zeros(value: Any) -> Any:
    return np.zeros_like(value) if isinstance(value, np.ndarray) else [_zeros(part) for part in value]


@register("SequenceConstruct", jvp=_sequence_jvp, rounds=False, data_dependent=True)
def _sequence_construct(node: Node, *parts: Array) -> list[Array]:
    return list(parts)


@register("SequenceInsert", jvp=_sequence_jvp, rounds=False, data_dependent=True)
def _sequence_insert(node: Node, sequence: list[Array], tensor: Array, position: Array | None = None) -> list[Array]:
    place = len(sequence) if position is None else position.item()
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], tensor, *sequence[place:]]


@register("SequenceAt", jvp=_sequence_jvp, rounds=False, data_dependent=True)
def _sequence_at(node: Node, sequence: list[Array], position: Array) -> Array:
    return sequence[position.item()]


@register("SequenceLength", rounds=False, data_dependent=True)
def _sequence_length(node: Node, sequence: list[Array]) -> Array:
    return np.array(len(sequence), np.int64)


@register("SplitToSequence", jvp=_sequence_jvp, rounds=False, data_dependent=True)
def _split_to_sequence(node: Node, x: Array, split: Array | None = None) -> list[Array]:
    axis = node.get("axis", 0)
    size = x.shape[axis]
    if split is None:
        parts = np.split(x, size, axis)
        return parts if node.get("keepdims", 1) else [part.squeeze(axis) for part in parts]
    if split.ndim == 0:
        each = split.item()
        return np.split(x, list(range(each, size, each)), axis)
    return np.split(x, np.cumsum(as_ints(split))[:-1].tolist(), axis)


@register("ConcatFromSequence", jvp=_sequence_jvp, rounds=False, data_dependent=True)
def _concat_from_sequence(node: Node, sequence: list[Array]) -> Array:
    join = np.stack if node.get("new_axis", 0) else np.concatenate
    return join(sequence, axis=node.attributes["axis"])


_SEQUENCE: dict[str, Any] = {
    "SequenceConstruct": _sequence_construct,
    "SequenceInsert": _sequence_insert,
    "SequenceAt": _sequence_at,
    "SplitToSequence": _split_to_sequence,
    "ConcatFromSequence": _concat_from_sequence,
}
