"""Element-wise operators: arithmetic, activations, comparisons and casts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from stepcell.runtime.evaluate.arithmetic import Array, is_float, rounded
from stepcell.runtime.evaluate.registry import OPERATORS, Node, Operator, linear, register

__all__ = ["relu", "sigmoid", "sigmoid_slope", "tanh_slope"]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); exp overflows to infinity, which gives 0."""
    y = np.asarray(np.negative(x))
    np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def sigmoid_slope(y: Array) -> Array:
    """The derivative of sigmoid, from its value."""
    slope: Array = y * (1 - y)
    return slope


def tanh_slope(y: Array) -> Array:
    """The derivative of tanh, from its value."""
    slope: Array = 1 - y * y
    return slope


def relu(x: Array) -> Array:
    """The larger of x and 0; NaN stays."""
    return np.maximum(x, x.dtype.type(0))


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype)


def _erf_slope(x: Array) -> Array:
    slope: Array = 2 / math.sqrt(math.pi) * np.exp(-x * x)
    return slope


def _softplus(x: Array) -> Array:
    return np.logaddexp(x, x.dtype.type(0))


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


def _inside(x: Array, alpha: float, beta: float) -> Array:
    """1 where a hard sigmoid has a slope."""
    y = alpha * x + beta
    return ((y > 0) & (y < 1)).astype(x.dtype)


def _gelu(node: Node, x: Array) -> Array:
    if node.get("approximate", "none") == "tanh":
        return 0.5 * x * (1 + np.tanh(_gelu_argument(x)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_argument(x: Array) -> Array:
    argument: Array = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return argument


def _gelu_slope(node: Node, x: Array, _: Array) -> Array:
    if node.get("approximate", "none") == "tanh":
        t = np.tanh(_gelu_argument(x))
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _hard_swish_slope(x: Array) -> Array:
    return np.where(x <= -3, 0.0, np.where(x >= 3, 1.0, (2 * x + 3) / 6))


def _elu(node: Node, x: Array) -> Array:
    alpha = node.get("alpha", 1.0)
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def _selu(node: Node, x: Array) -> Array:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def _selu_slope(node: Node, x: Array, _: Array) -> Array:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * np.where(x < 0, alpha * np.exp(np.minimum(x, 0)), 1.0)


def _mish_slope(x: Array) -> Array:
    t, s = np.tanh(_softplus(x)), sigmoid(x)
    slope: Array = t + x * s * (1 - t * t)
    return slope


# name: (value from node and x, derivative from node, x and value or None where it is zero)
_Value = Callable[[Node, Any], Any]
_Slope = Callable[[Node, Any, Any], Any]
_UNARY: dict[str, tuple[_Value, _Slope | None]] = {
    "Neg": (lambda n, x: -x, lambda n, x, y: -1.0),
    "Abs": (lambda n, x: np.abs(x), lambda n, x, y: np.sign(x)),
    "Sqrt": (lambda n, x: np.sqrt(x), lambda n, x, y: 0.5 / y),
    "Reciprocal": (lambda n, x: 1 / x, lambda n, x, y: -y * y),
    "Exp": (lambda n, x: np.exp(x), lambda n, x, y: y),
    "Log": (lambda n, x: np.log(x), lambda n, x, y: 1 / x),
    "Sin": (lambda n, x: np.sin(x), lambda n, x, y: np.cos(x)),
    "Cos": (lambda n, x: np.cos(x), lambda n, x, y: -np.sin(x)),
    "Tan": (lambda n, x: np.tan(x), lambda n, x, y: 1 + y * y),
    "Asin": (lambda n, x: np.arcsin(x), lambda n, x, y: 1 / np.sqrt(1 - x * x)),
    "Acos": (lambda n, x: np.arccos(x), lambda n, x, y: -1 / np.sqrt(1 - x * x)),
    "Atan": (lambda n, x: np.arctan(x), lambda n, x, y: 1 / (1 + x * x)),
    "Sinh": (lambda n, x: np.sinh(x), lambda n, x, y: np.cosh(x)),
    "Cosh": (lambda n, x: np.cosh(x), lambda n, x, y: np.sinh(x)),
    "Tanh": (lambda n, x: np.tanh(x), lambda n, x, y: tanh_slope(y)),
    "Erf": (lambda n, x: _erf(x), lambda n, x, y: _erf_slope(x)),
    "Sigmoid": (lambda n, x: sigmoid(x), lambda n, x, y: sigmoid_slope(y)),
    "Softplus": (lambda n, x: _softplus(x), lambda n, x, y: sigmoid(x)),
    "Softsign": (lambda n, x: x / (1 + np.abs(x)), lambda n, x, y: 1 / (1 + np.abs(x)) ** 2),
    "Relu": (lambda n, x: relu(x), lambda n, x, y: x > 0),
    "LeakyRelu": (
        lambda n, x: np.where(x < 0, n.get("alpha", 0.01) * x, x),
        lambda n, x, y: np.where(x < 0, n.get("alpha", 0.01), 1.0),
    ),
    "ThresholdedRelu": (
        lambda n, x: np.where(x > n.get("alpha", 1.0), x, 0),
        lambda n, x, y: x > n.get("alpha", 1.0),
    ),
    "Elu": (_elu, lambda n, x, y: np.where(x < 0, n.get("alpha", 1.0) * np.exp(np.minimum(x, 0)), 1.0)),
    "Celu": (
        lambda n, x: np.maximum(x, 0) + np.minimum(0, n.get("alpha", 1.0) * np.expm1(x / n.get("alpha", 1.0))),
        lambda n, x, y: np.where(x < 0, np.exp(np.minimum(x, 0) / n.get("alpha", 1.0)), 1.0),
    ),
    "Selu": (_selu, _selu_slope),
    "HardSigmoid": (
        lambda n, x: _hard_sigmoid(x, n.get("alpha", 0.2), n.get("beta", 0.5)),
        lambda n, x, y: n.get("alpha", 0.2) * _inside(x, n.get("alpha", 0.2), n.get("beta", 0.5)),
    ),
    "HardSwish": (lambda n, x: x * _hard_sigmoid(x, 1 / 6, 0.5), lambda n, x, y: _hard_swish_slope(x)),
    "Swish": (
        lambda n, x: x * sigmoid(n.get("alpha", 1.0) * x),
        lambda n, x, y: (s := sigmoid(n.get("alpha", 1.0) * x)) * (1 + n.get("alpha", 1.0) * x * (1 - s)),
    ),
    "Mish": (lambda n, x: x * np.tanh(_softplus(x)), lambda n, x, y: _mish_slope(x)),
    "Gelu": (_gelu, _gelu_slope),
    "Sign": (lambda n, x: np.sign(x), None),
    "Floor": (lambda n, x: np.floor(x), None),
    "Ceil": (lambda n, x: np.ceil(x), None),
    "Round": (lambda n, x: np.rint(x), None),
}


def _unary_jvp(slope: _Slope) -> Any:
    return lambda node, inputs, outputs, tangents: slope(node, inputs[0], outputs[0]) * tangents[0]


for _name, (_value, _slope) in _UNARY.items():
    OPERATORS[_name] = Operator(_value, jvp=None if _slope is None else _unary_jvp(_slope), tabulated=True)


def _binary_jvp(left: Callable[[Any, Any, Any], Any], right: Callable[[Any, Any, Any], Any]) -> Any:
    """From the partial derivatives, which are functions of both inputs and the result."""

    def jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
        (a, b), y, (da, db) = inputs, outputs[0], tangents
        change: Any = 0.0
        if da is not None:
            change = left(a, b, y) * da
        if db is not None:
            change = change + right(a, b, y) * db
        return change

    return jvp


@register("Add", jvp=_binary_jvp(lambda a, b, y: 1.0, lambda a, b, y: 1.0))
def _add(node: Node, a: Array, b: Array) -> Array:
    return np.add(a, b)


@register("Sub", jvp=_binary_jvp(lambda a, b, y: 1.0, lambda a, b, y: -1.0))
def _sub(node: Node, a: Array, b: Array) -> Array:
    return np.subtract(a, b)


@register("Mul", jvp=_binary_jvp(lambda a, b, y: b, lambda a, b, y: a))
def _mul(node: Node, a: Array, b: Array) -> Array:
    return np.multiply(a, b)


@register("Div", jvp=_binary_jvp(lambda a, b, y: 1 / b, lambda a, b, y: -y / b))
def _div(node: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        quotient: Array = np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b))  # towards zero
        return quotient.astype(a.dtype)
    return np.divide(a, b)


@register("Pow", jvp=_binary_jvp(lambda a, b, y: b * np.power(a, b - 1), lambda a, b, y: y * np.log(a)))
def _pow(node: Node, a: Array, b: Array) -> Array:
    return np.power(a, b).astype(a.dtype)


@register("Mod", jvp=_binary_jvp(lambda a, b, y: 1.0, lambda a, b, y: (y - a) / b))
def _mod(node: Node, a: Array, b: Array) -> Array:
    return np.fmod(a, b) if node.get("fmod", 0) else np.mod(a, b)


@register("PRelu", jvp=_binary_jvp(lambda a, b, y: np.where(a < 0, b, 1.0), lambda a, b, y: np.where(a < 0, a, 0.0)))
def _prelu(node: Node, x: Array, slope: Array) -> Array:
    return np.where(x < 0, slope * x, x)


def _extremum_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    change: Any = 0.0
    taken = np.zeros(outputs[0].shape, bool)
    for value, tangent in zip(inputs, tangents, strict=True):
        mine = (value == outputs[0]) & ~taken
        taken |= mine
        if tangent is not None:
            change = change + np.where(mine, tangent, 0.0)
    return change


@register("Max", jvp=_extremum_jvp)
def _max(node: Node, *inputs: Array) -> Array:
    return reduce(np.maximum, inputs)


@register("Min", jvp=_extremum_jvp)
def _min(node: Node, *inputs: Array) -> Array:
    return reduce(np.minimum, inputs)


def _sum_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return reduce(np.add, [tangent for tangent in tangents if tangent is not None])


@register("Sum", jvp=_sum_jvp)
def _sum(node: Node, *inputs: Array) -> Array:
    return reduce(np.add, inputs)


@register("Mean", jvp=lambda n, i, o, t: _sum_jvp(n, i, o, t) / len(i))
def _mean(node: Node, *inputs: Array) -> Array:
    return reduce(np.add, inputs) / inputs[0].dtype.type(len(inputs))


def _clip_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    if tangents[0] is None:
        return None
    x, (low, high) = inputs[0], _limits(node, inputs[1:])
    inside = np.ones(x.shape, bool)
    if low is not None:
        inside &= x > low
    if high is not None:
        inside &= x < high
    return np.where(inside, tangents[0], 0.0)


def _limits(node: Node, limits: Sequence[Any]) -> tuple[Any, Any]:
    """The lower and the upper limit: inputs since opset 11, attributes before."""
    low, high = (*limits, None, None)[:2]
    return (node.get("min"), node.get("max")) if node.opset < 11 else (low, high)


@register("Clip", jvp=_clip_jvp)
def _clip(node: Node, x: Array, *limits: Array | None) -> Array:
    low, high = _limits(node, limits)
    y = x if low is None else np.maximum(x, np.asarray(low, x.dtype))
    return y if high is None else np.minimum(y, np.asarray(high, x.dtype))


for _name, _function in {
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "Not": np.logical_not,
    "IsNaN": np.isnan,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "BitwiseNot": np.invert,
}.items():
    OPERATORS[_name] = Operator(lambda node, *inputs, f=_function: f(*inputs), rounds=False)


@register("IsInf", rounds=False)
def _is_inf(node: Node, x: Array) -> Array:
    positive, negative = node.get("detect_positive", 1), node.get("detect_negative", 1)
    return np.isinf(x) & ((x > 0) & bool(positive) | (x < 0) & bool(negative))


def _cast_jvp(node: Node, inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Any]) -> Any:
    return tangents[0] if is_float(outputs[0].dtype) else None


@register("Cast", jvp=_cast_jvp, rounds=False)
def _cast(node: Node, x: Array) -> Array:
    return _convert(x, node.widening.dtype(node.attributes["to"]))


@register("CastLike", jvp=_cast_jvp, rounds=False)
def _cast_like(node: Node, x: Array, like: Array) -> Array:
    return _convert(x, like.dtype)


def _convert(x: Array, dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu" and is_float(x.dtype):
        x = np.trunc(x.astype(np.float64))
    return rounded(x, dtype)


@register("Identity", jvp=linear, rounds=False)
def _identity(node: Node, x: Any) -> Any:
    return x


@register("Dropout", jvp=lambda n, i, o, t: t[0], rounds=False)
def _dropout(node: Node, x: Array, *ignored: Any) -> tuple[Array, Array]:
    return x, np.ones(x.shape, bool)
