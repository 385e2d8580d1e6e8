"""Registry of operators: for each ONNX operator how it is computed and what its derivative is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from stepcell.errors import EvaluationError
from stepcell.runtime.evaluate.arithmetic import Array, Widening

__all__ = [
    "OPERATORS",
    "Body",
    "Jvp",
    "Kernel",
    "Node",
    "Operator",
    "as_ints",
    "linear",
    "no_derivative",
    "register",
    "unsupported",
]


class Body(Protocol):
    """A subgraph; see `stepcell.runtime.evaluate.program.Program`."""

    inputs: list[str]
    outputs: list[str]
    captured: list[str]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...

    def run_jvp(
        self, feeds: Mapping[str, Any], tangents: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]: ...


@dataclass(eq=False)
class Node:
    """One node of a graph.

    Attributes:
        inputs: names; "" for an optional input that is absent. A node with subgraphs also has
            the values here that they read from the graph around them (the last `captured`).
        outputs: names; "" for an output that nothing asks for.
        attributes: numbers, texts, lists of them, and tensors as arrays.
        bodies: subgraphs by attribute.
        opset: version of the standard operator set.
    """

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    opset: int
    widening: Widening
    bodies: dict[str, Body] = field(default_factory=dict)
    captured: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"node {self.name or self.outputs[0]!r} ({self.op})"

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute, or `default` where the node has none."""
        return self.attributes.get(attribute, default)


class Kernel(Protocol):
    """Computes a node: arrays in the order of its inputs, None for an absent one."""

    def __call__(self, node: Node, /, *inputs: Any) -> Any:
        """The output, or a tuple of outputs."""


class Jvp(Protocol):
    """Forward-mode derivative of a node."""

    def __call__(self, node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any], /) -> Any:
        """The tangent of the output, or a tuple of tangents; None is zero.

        Args:
            tangents: in the order of the inputs; None where an input does not change. At least one
                is not None.
        """


@dataclass(frozen=True)
class Operator:
    """How an operator is evaluated.

    Attributes:
        kernel: computes it.
        jvp: its derivative; None where it has none (comparisons, shapes): its tangent is zero.
        rounds: it computes. Inputs of 16 bits are widened to float32 before the kernel, and its
            float results are rounded once to the type of the first input. Otherwise the kernel
            gets the inputs as they are (it moves elements, or says itself which type it returns).
        tabulated: a function of one element. For floats of 16 bits it is looked up in a table that was
            computed in float64, so it is rounded correctly.
        shaping: indices of the inputs whose values, not only shapes, decide the shape of a result.
        data_dependent: the shape of a result depends on values in general.
    """

    kernel: Kernel
    jvp: Jvp | None = None
    rounds: bool = True
    tabulated: bool = False
    shaping: range = range(0)
    data_dependent: bool = False


OPERATORS: dict[str, Operator] = {}


def register(*names: str, **settings: Any) -> Callable[[Kernel], Kernel]:
    """Enter the decorated kernel for these operators; `settings` are fields of `Operator`."""

    def enter(kernel: Kernel) -> Kernel:
        for name in names:
            OPERATORS[name] = Operator(kernel, **settings)
        return kernel

    return enter


def linear(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Derivative of an operator that is linear in its first input, and constant in the others."""
    if tangents[0] is None:
        return tuple(None for _ in outputs)
    return OPERATORS[node.op].kernel(node, tangents[0], *inputs[1:])


def no_derivative(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """For an operator whose derivative is not written."""
    raise unsupported(node, "its derivative is not implemented")


def unsupported(node: Node, reason: str) -> EvaluationError:
    """An error that names the node and what the evaluator cannot do with it."""
    return EvaluationError(f"{node}: {reason}")


def as_ints(array: Array | Sequence[int] | None) -> list[int]:
    """Integers of an input or of an attribute; files of other exporters have a scalar where there is one."""
    return [] if array is None else [int(value) for value in np.ravel(array)]
