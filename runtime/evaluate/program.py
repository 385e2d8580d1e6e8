"""An ONNX graph as a list of numpy calls: constants folded, shapes computed once for each input size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stepcell.errors import EvaluationError
from stepcell.runtime.evaluate.arithmetic import Array, Widening, is_float, is_narrow, rounded, widened
from stepcell.runtime.evaluate.operators import OPERATORS
from stepcell.runtime.evaluate.registry import Node, Operator, unsupported

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, NodeProto

__all__ = ["Program"]

_PLANS = 4  # input sizes whose plans are kept

Values = dict[str, Any]


@dataclass(eq=False)
class _Call:
    """A node of a plan.

    Attributes:
        constants: by input, widened to float32 where the operator computes; None where it is a value.
        dtype: dtype of the first input as the graph has it, where that is a constant.
        last_use: the values that nothing reads after it.
    """

    node: Node
    operator: Operator
    constants: list[Any]
    dtype: np.dtype[Any] | None
    last_use: list[str]


class Program:
    """A graph that can be evaluated for inputs of any size.

    Args:
        graph: without calls of functions; its weights are in memory.
        opset: version of the standard operator set.
        widening: the types in which floats are held.
        outer: names of values that a graph around this one defines.

    Raises:
        EvaluationError: the graph holds an operator that is not implemented.
    """

    def __init__(self, graph: GraphProto, opset: int, widening: Widening, outer: frozenset[str] = frozenset()) -> None:
        if graph.sparse_initializer:
            raise EvaluationError("sparse weights are not implemented")
        self._widening = widening
        self._constants: Values = {tensor.name: widening.tensor(tensor) for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self._constants]
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in graph.output]
        self._dtypes = {
            value.name: widening.dtype(value.type.tensor_type.elem_type)
            for value in inputs
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type
        }
        defined = {*self.inputs, *self._constants, *(name for node in graph.node for name in node.output)}
        self.nodes: list[Node] = [_node(node, opset, widening, outer | defined) for node in graph.node]
        read = {name for node in self.nodes for name in node.inputs} | set(self.outputs)
        self.captured = sorted((read & outer) - defined)
        self._fold()
        self._plans: dict[tuple[Any, ...], tuple[list[_Call], Values]] = {}

    def run(self, feeds: Mapping[str, Any]) -> Values:
        """The outputs of the graph for its inputs (and captured values), by name.

        Inputs of another float type are rounded to that of the graph.
        """
        return self._run(feeds, None)[0]

    def run_jvp(self, feeds: Mapping[str, Any], tangents: Mapping[str, Any]) -> tuple[Values, Values]:
        """The outputs, and their derivative in the direction of `tangents`.

        Args:
            tangents: by input, of its shape; an input that is absent or None does not change.

        Returns:
            outputs and tangents of the outputs, None where one does not change.
        """
        return self._run(feeds, {name: value for name, value in tangents.items() if value is not None})

    def _run(self, feeds: Mapping[str, Any], tangents: Values | None) -> tuple[Values, Values]:
        values: Values = {}
        for name in (*self.inputs, *self.captured):
            value = feeds[name]
            dtype = self._dtypes.get(name)
            values[name] = value if dtype is None else rounded(np.asarray(value), dtype)
        key = tuple((name, _signature(value)) for name, value in values.items())
        duals = tangents
        with np.errstate(all="ignore"):
            if key not in self._plans:
                if len(self._plans) >= _PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = self._plan(dict(values))
            calls, static = self._plans[key]
            for call in calls:
                _execute(call, values, duals)
        return self._results(values, static), self._results(duals or {}, {})

    def _results(self, values: Values, static: Values) -> Values:
        return {name: values[name] if name in values else static.get(name) for name in self.outputs}

    def _fold(self) -> None:
        """Compute what depends on constants alone."""
        kept = []
        with np.errstate(all="ignore"):
            for node in self.nodes:
                if any(name and name not in self._constants for name in node.inputs) or node.op.startswith("Random"):
                    kept.append(node)
                else:
                    self._constants.update(_compute(node, [self._constants.get(name) for name in node.inputs]))
        self.nodes = kept

    def _plan(self, values: Values) -> tuple[list[_Call], Values]:
        """The calls for inputs of these sizes. What depends on the sizes alone is computed here and kept."""
        static: Values = dict(self._constants)
        sized = set(values)  # names of values whose shape follows from the shapes of the inputs
        dynamic: list[Node] = []
        last = {name: index for index, node in enumerate(self.nodes) for name in node.inputs}
        for index, node in enumerate(self.nodes):
            operator = OPERATORS[node.op]
            names = [name for name in node.inputs if name]
            arguments = [static.get(name, values.get(name)) for name in node.inputs]
            results = _compute(node, arguments)
            known = all(name in static for name in names)
            follows = all(name in static or name in sized for name in names)
            if known or (node.op in ("Shape", "Size") and follows):
                static.update(results)
                continue
            values.update(results)
            dynamic.append(node)
            shaping = [node.inputs[place] for place in operator.shaping if place < len(node.inputs)]
            if follows and not operator.data_dependent and all(name in static for name in shaping if name):
                sized.update(results)
            for name in names:
                if last[name] == index:
                    values.pop(name, None)
        return self._calls(dynamic, static), {name: static[name] for name in self.outputs if name in static}

    def _calls(self, nodes: Sequence[Node], static: Values) -> list[_Call]:
        """The nodes that the outputs need, in order, each with its constants and the values that end there."""
        needed = set(self.outputs)
        calls: list[_Call] = []
        wide: Values = {}
        for node in reversed(nodes):
            if needed.isdisjoint(node.outputs):
                continue
            operator = OPERATORS[node.op]
            constants = []
            for name in node.inputs:
                value = static.get(name) if name else None
                if value is not None and operator.rounds:
                    value = wide.setdefault(name, widened(value))
                constants.append(value)
            read = {name for name, value in zip(node.inputs, constants, strict=True) if name and value is None}
            unread = {name for name in node.outputs if name} - needed
            first = static.get(node.inputs[0]) if node.inputs else None
            dtype = first.dtype if isinstance(first, np.ndarray) else None
            calls.append(_Call(node, operator, constants, dtype, [*(read - needed), *unread]))
            needed |= read
        return calls[::-1]


def _execute(call: _Call, values: Values, duals: Values | None) -> None:
    """One call: its results into `values`, and their tangents into `duals`."""
    node = call.node
    arguments = [
        values[name] if name and constant is None else constant
        for name, constant in zip(node.inputs, call.constants, strict=True)
    ]
    results = _compute(node, arguments, call.dtype)
    if duals:
        tangents = [
            duals.get(name) if constant is None else None
            for name, constant in zip(node.inputs, call.constants, strict=True)
        ]
        if any(tangent is not None for tangent in tangents):
            duals.update(_differentiate(call, arguments, results, tangents))
    values.update(results)
    for name in call.last_use:
        values.pop(name, None)
        if duals:
            duals.pop(name, None)


def _differentiate(call: _Call, arguments: Sequence[Any], results: Values, tangents: Sequence[Any]) -> Values:
    if call.operator.jvp is None:
        return {}
    found = call.operator.jvp(call.node, arguments, [results.get(name) for name in call.node.outputs], tangents)
    found = found if isinstance(found, tuple) else (found,)
    changes: Values = {}
    for name, tangent in zip(call.node.outputs, found, strict=False):
        if name and tangent is not None:
            whole = results[name]
            changes[name] = np.broadcast_to(tangent, whole.shape) if isinstance(whole, np.ndarray) else tangent
    return changes


def _compute(node: Node, arguments: Sequence[Any], dtype: np.dtype[Any] | None = None) -> Values:
    """The results of a node, in the types that the graph gives them.

    Args:
        dtype: dtype of the first argument in the graph, where it was widened beforehand.
    """
    operator = OPERATORS[node.op]
    narrow = None
    if operator.rounds:
        dtype = dtype or arguments[0].dtype
        if is_narrow(dtype):
            narrow = dtype
            if operator.tabulated:
                return {node.outputs[0]: _looked_up(node, rounded(arguments[0], dtype))}
            arguments = [value if value is None else widened(value) for value in arguments]
    try:
        results = operator.kernel(node, *arguments)
    except EvaluationError:
        raise
    except Exception as error:
        shapes = ", ".join(_described(value) for value in arguments)
        raise EvaluationError(f"{node}: {type(error).__name__}: {error}; inputs {shapes}") from error
    results = results if isinstance(results, tuple) else (results,)
    results = tuple(np.asarray(value) if isinstance(value, np.generic) else value for value in results)
    if narrow is not None:
        results = tuple(rounded(value, narrow) if is_float(value.dtype) else value for value in results)
    return {name: value for name, value in zip(node.outputs, results, strict=False) if name}


def _looked_up(node: Node, x: Array) -> Array:
    attributes = tuple((key, value) for key, value in sorted(node.attributes.items()) if np.isscalar(value))
    table = _table(node.op, attributes, node.opset, node.widening, x.dtype)
    return np.asarray(table.take(x.view(np.uint16)))


@lru_cache(maxsize=64)
def _table(op: str, attributes: Any, opset: int, widening: Widening, dtype: np.dtype[Any]) -> Array:
    """The function of every 16-bit float, computed in float64 and rounded."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float64)
    node = Node(op, "", ["x"], ["y"], dict(attributes), opset, widening)
    result: Array = OPERATORS[op].kernel(node, every).astype(dtype)
    return result


def _node(proto: NodeProto, opset: int, widening: Widening, outer: frozenset[str]) -> Node:
    if proto.domain not in ("", "ai.onnx") or proto.op_type not in OPERATORS:
        domain = f"{proto.domain}::" if proto.domain else ""
        raise EvaluationError(
            f"node {proto.name or proto.output[0]!r}: operator {domain}{proto.op_type} is not implemented",
            hint="ONNX Runtime writes such operators when it saves an optimised file: take the file as it was before"
            if domain.startswith("com.microsoft")
            else None,
        )
    node = Node(proto.op_type, proto.name, list(proto.input), list(proto.output), {}, opset, widening)
    for attribute in proto.attribute:
        if attribute.HasField("g"):
            node.bodies[attribute.name] = Program(attribute.g, opset, widening, outer)
        else:
            node.attributes[attribute.name] = _value(node, attribute, widening)
    node.captured = sorted({name for body in node.bodies.values() for name in body.captured})
    node.inputs += node.captured
    return node


def _value(node: Node, attribute: AttributeProto, widening: Widening) -> Any:
    from onnx import AttributeProto, helper

    if attribute.type == AttributeProto.TENSOR:
        return widening.tensor(attribute.t)
    if attribute.type in (AttributeProto.FLOAT, AttributeProto.INT):
        return helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.STRING:
        return attribute.s.decode()
    if attribute.type in (AttributeProto.FLOATS, AttributeProto.INTS):
        return list(helper.get_attribute_value(attribute))
    if attribute.type == AttributeProto.STRINGS:
        return [text.decode() for text in attribute.strings]
    raise unsupported(node, f"an attribute such as {attribute.name!r} is not implemented")


def _signature(value: Any) -> Any:
    return value.shape if isinstance(value, np.ndarray) else _sequence_signature(value)


def _sequence_signature(value: Iterable[Any]) -> Any:
    return tuple(_signature(part) for part in value)


def _described(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else str(type(value).__name__)
