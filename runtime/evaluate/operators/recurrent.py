"""RNN, GRU and LSTM nodes: a loop over time in float32 or float64, rounded at the node's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array
from stepcell.runtime.evaluate.operators.elementwise import relu, sigmoid, sigmoid_slope, tanh_slope
from stepcell.runtime.evaluate.registry import Node, register, unsupported

__all__: list[str] = []

# An activation and its derivative as a function of its value.
_ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "sigmoid": (sigmoid, sigmoid_slope),
    "tanh": (np.tanh, tanh_slope),
    "relu": (relu, lambda y: (y > 0).astype(y.dtype)),
}
_DEFAULT = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


class _Dual:
    """A value and its change; the change is None where there is none."""

    __slots__ = ("change", "value")

    def __init__(self, value: Array, change: Array | None = None) -> None:
        self.value, self.change = value, change

    def __add__(self, other: _Dual) -> _Dual:
        return _Dual(self.value + other.value, _total(self.change, other.change))

    def __mul__(self, other: _Dual) -> _Dual:
        left = None if self.change is None else self.change * other.value
        right = None if other.change is None else self.value * other.change
        return _Dual(self.value * other.value, _total(left, right))

    def product(self, weights: Array) -> _Dual:
        """This times the transposed weights, which do not change."""
        return _Dual(self.value @ weights.T, None if self.change is None else self.change @ weights.T)

    def apply(self, name: str) -> _Dual:
        """An activation of this."""
        function, slope = _ACTIVATIONS[name]
        value = function(self.value)
        return _Dual(value, None if self.change is None else slope(value) * self.change)

    def complement(self) -> _Dual:
        """1 - this."""
        return _Dual(1 - self.value, None if self.change is None else -self.change)

    def part(self, key: Any) -> _Dual:
        """An indexed part."""
        return _Dual(self.value[key], None if self.change is None else self.change[key])


def _total(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


def _stack(parts: Sequence[_Dual], axis: int = 0) -> _Dual:
    value = np.stack([part.value for part in parts], axis)
    if all(part.change is None for part in parts):
        return _Dual(value)
    return _Dual(value, np.stack([np.zeros_like(p.value) if p.change is None else p.change for p in parts], axis))


def _chunks(gates: _Dual, count: int) -> list[_Dual]:
    size = gates.value.shape[-1] // count
    return [gates.part((..., slice(index * size, (index + 1) * size))) for index in range(count)]


def _run(node: Node, inputs: Sequence[Any], tangents: Sequence[Any]) -> list[_Dual]:
    """Y (time, directions, batch, hidden), Y_h and, of an LSTM, Y_c (directions, batch, hidden)."""
    x, w, r, b, lengths, h0, c0, peepholes = (*inputs, *(None,) * 8)[:8]
    dx, dw, dr, db, _, dh0, dc0, dp = (*tangents, *(None,) * 8)[:8]
    if any(change is not None for change in (dw, dr, db, dp)):
        raise unsupported(node, "its derivative with respect to the weights is not implemented")
    if node.get("layout", 0):
        x = np.swapaxes(x, 0, 1)
        dx = None if dx is None else np.swapaxes(dx, 0, 1)
        h0, c0, dh0, dc0 = (None if a is None else np.swapaxes(a, 0, 1) for a in (h0, c0, dh0, dc0))
    time, batch, _ = x.shape
    if lengths is not None and np.any(lengths != time):
        raise unsupported(node, "sequences of different lengths are not implemented")
    if node.get("clip") is not None or node.get("input_forget", 0):
        raise unsupported(node, "clip and input_forget are not implemented")
    hidden, count, names = r.shape[2], r.shape[0], _activations(node, r.shape[0])
    direction = node.get("direction", "forward")
    rows, lasts, cells = [], [], []
    for index in range(count):
        bias = np.zeros(2 * _GATES[node.op] * hidden, x.dtype) if b is None else b[index]
        zeros = np.zeros((batch, hidden), x.dtype)
        h, c = (
            _Dual(zeros if start is None else start[index], None if move is None else move[index])
            for start, move in ((h0, dh0), (c0, dc0))
        )
        steps = range(time)
        if direction == "reverse" or index == 1:
            steps = range(time - 1, -1, -1)
        found: list[_Dual] = [h] * time
        for t in steps:
            frame = _Dual(x[t], None if dx is None else dx[t])
            h, c = _step(
                node,
                frame,
                h,
                c,
                w[index],
                r[index],
                bias,
                None if peepholes is None else peepholes[index],
                names[index],
            )
            found[t] = h
        rows.append(_stack(found))
        lasts.append(h)
        cells.append(c)
    results = [_stack(rows, 1), _stack(lasts), *([_stack(cells)] if node.op == "LSTM" else [])]
    if node.get("layout", 0):
        moves = [(0, 1, 2, 3), (1, 0, 2), (1, 0, 2)]
        moves[0] = (2, 0, 1, 3)
        results = [
            _Dual(y.value.transpose(axes), None if y.change is None else y.change.transpose(axes))
            for y, axes in zip(results, moves, strict=False)
        ]
    return results


def _activations(node: Node, count: int) -> list[list[str]]:
    names = [name.lower() for name in node.get("activations") or _DEFAULT[node.op] * count]
    for name in names:
        if name not in _ACTIVATIONS:
            raise unsupported(node, f"the activation {name} is not implemented")
    each = len(_DEFAULT[node.op])
    return [names[index * each : (index + 1) * each] for index in range(count)]


def _step(
    node: Node,
    x: _Dual,
    h: _Dual,
    c: _Dual,
    w: Array,
    r: Array,
    b: Array,
    peepholes: Array | None,
    names: Sequence[str],
) -> tuple[_Dual, _Dual]:
    gates = _GATES[node.op] * r.shape[1]
    of_x, bias_h = x.product(w) + _Dual(b[:gates]), _Dual(b[gates:])
    if node.op == "GRU":
        return _gru(node, of_x, h, r, bias_h, names), c
    whole = of_x + h.product(r) + bias_h
    if node.op == "RNN":
        return whole.apply(names[0]), c
    i, o, f, g = _chunks(whole, 4)
    if peepholes is not None:
        p_i, p_o, p_f = np.split(peepholes, 3)
        i, f = i + c * _Dual(p_i), f + c * _Dual(p_f)
    c = f.apply(names[0]) * c + i.apply(names[0]) * g.apply(names[1])
    if peepholes is not None:
        o = o + c * _Dual(p_o)
    return o.apply(names[0]) * c.apply(names[2]), c


def _gru(node: Node, of_x: _Dual, h: _Dual, r: Array, bias: _Dual, names: Sequence[str]) -> _Dual:
    size = r.shape[1]
    x_z, x_r, x_n = _chunks(of_x, 3)
    b_z, b_r, b_n = _chunks(bias, 3)
    z = (x_z + h.product(r[:size]) + b_z).apply(names[0])
    reset = (x_r + h.product(r[size : 2 * size]) + b_r).apply(names[0])
    if node.get("linear_before_reset", 0):
        n = (x_n + reset * (h.product(r[2 * size :]) + b_n)).apply(names[1])
    else:
        n = (x_n + (reset * h).product(r[2 * size :]) + b_n).apply(names[1])
    return z.complement() * n + z * h


def _jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return tuple(result.change for result in _run(node, inputs, tangents))


@register("RNN", "GRU", "LSTM", jvp=_jvp)
def _recurrent(node: Node, *inputs: Array | None) -> tuple[Array, ...]:
    return tuple(result.value for result in _run(node, inputs, ()))
