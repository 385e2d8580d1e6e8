"""Activations of gates and candidates, in every spelling, reduced to one function of one pre-activation.

A hard sigmoid is a line clipped to 0..1: `HardSigmoid`, `Clip(x / 2 + 1 / 2, 0, 1)`, `Relu6(x + 3) / 6`.
The ops take `clip(v / 2 + 1 / 2, 0, 1)` and `clip(v, -1, 1)`; any other slope or offset becomes a
factor and a term of the pre-activation v, which is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxscript import ir

from stepcell.exporter.cell_recognition.values import channel_range, scalar, uncast

__all__ = ["Activation", "activation"]

_SOFT = {"Sigmoid": ("gate", "sigmoid"), "Tanh": ("candidate", "tanh")} | {
    op: ("candidate", op)
    for op in ("Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Selu", "Softsign", "Softplus", "Mish", "HardSwish")
}
_HARD = {(0.0, 1.0): ("gate", "hard sigmoid"), (-1.0, 1.0): ("candidate", "hard tanh")}
_CLOSE = 1e-6


@dataclass(frozen=True, eq=False)
class Activation:
    """A gate or candidate: `kind(scale * argument + offset)`, or some channels of it.

    Attributes:
        role: "gate" for functions onto 0 to 1, else "candidate".
        kind: "sigmoid", "hard sigmoid", "tanh", "hard tanh", or the operator that is used instead.
        argument: the value it is computed from.
        channels: the range of the argument's channels that is taken; None: all.
        scale, offset: other than 1 and 0 for hard activations only.
    """

    role: str
    kind: str
    argument: ir.Value
    channels: tuple[int, int] | None
    scale: float = 1.0
    offset: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it is applied to all of its argument as it is."""
        return self.channels is None and abs(self.scale - 1) < _CLOSE and abs(self.offset) < _CLOSE


def activation(value: ir.Value) -> Activation | None:
    """The activation that a value is, or is some channels of."""
    channels = None
    whole = uncast(value)
    if (selected := channel_range(whole)) is not None:
        whole, channels = uncast(selected[0]), selected[1:]
    node = whole.producer()
    if node is not None and not node.domain and node.op_type in _SOFT and node.inputs[0] is not None:
        hard = _hard(value)  # Relu may be the outer half of a Clip
        return hard or Activation(*_SOFT[node.op_type], node.inputs[0], channels)
    return _hard(value)


def _hard(value: ir.Value) -> Activation | None:
    """`clip(scale * u + offset, low, high)` with limits of a sigmoid or a tanh."""
    scale, offset, low, high = 1.0, 0.0, -math.inf, math.inf
    channels = None
    while True:
        value = uncast(value)
        node = value.producer()
        if node is None or node.domain or not node.inputs or node.inputs[0] is None:
            break
        if channels is None and (selected := channel_range(value)) is not None:
            value, channels = selected[0], selected[1:]
            continue
        if (line := _line(node)) is not None:
            value, factor, term = line
            scale, offset = scale * factor, scale * term + offset
        elif (clip := _clip(node)) is not None:
            value, slope, intercept, bottom, top = clip
            bottom, top = (min(max(scale * limit + offset, low), high) for limit in (bottom, top))
            low, high = bottom, top
            scale, offset = scale * slope, scale * intercept + offset
        else:
            break
    found = next((each for limits, each in _HARD.items() if _near(limits, (low, high))), None)
    if found is None or scale <= 0:
        return None
    role, kind = found
    if kind == "hard sigmoid":  # in the op's form, clip(v / 2 + 1 / 2, 0, 1)
        scale, offset = 2 * scale, 2 * offset - 1
    return Activation(role, kind, value, channels, scale, offset)


def _line(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """`factor * u + term` of an arithmetic operator with one scalar constant; only rising lines."""
    if len(node.inputs) != 2 or node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    first, second = node.inputs
    number, other = scalar(second), first
    if number is None and node.op_type in ("Add", "Mul"):
        number, other = scalar(first), second
    if number is None or other is None or other.const_value is not None:
        return None
    match node.op_type:
        case "Add":
            return other, 1.0, number
        case "Sub":
            return other, 1.0, -number
        case "Mul" if number > 0:
            return other, number, 0.0
        case "Div" if number > 0:
            return other, 1 / number, 0.0
        case _:
            return None


def _clip(node: ir.Node) -> tuple[ir.Value, float, float, float, float] | None:
    """u, slope, intercept and limits of an operator that clips a rising line."""
    source = node.inputs[0]
    assert source is not None
    match node.op_type:
        case "HardSigmoid":
            slope = node.attributes.get_float("alpha", 0.2)
            return (source, slope, node.attributes.get_float("beta", 0.5), 0.0, 1.0) if slope > 0 else None
        case "Relu":
            return source, 1.0, 0.0, 0.0, math.inf
        case "Min" | "Max" if len(node.inputs) == 2:
            number, other = scalar(node.inputs[1]), source
            if number is None:
                number, other = scalar(source), node.inputs[1]  # type: ignore[assignment]
            if number is None or other is None:
                return None
            return (other, 1.0, 0.0, *((-math.inf, number) if node.op_type == "Min" else (number, math.inf)))
        case "Clip":
            limits = [node.attributes.get_float(name, limit) for name, limit in (("min", -math.inf), ("max", math.inf))]
            for index, given in enumerate(node.inputs[1:3]):
                if given is not None:
                    number = scalar(given)
                    if number is None:
                        return None
                    limits[index] = number
            return source, 1.0, 0.0, limits[0], limits[1]
        case _:
            return None


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(a - b) <= _CLOSE for a, b in zip(one, other, strict=True))
