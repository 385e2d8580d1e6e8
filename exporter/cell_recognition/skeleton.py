"""The gating of a cell: which values are its gates and states, whatever its convolutions are.

ConvGRU: `h' = (1 - z) h + z n` (Ballas et al. 2016), or with z on the other side (Cho et al. 2014).
ConvLSTM: `c' = f c + i g` and `h' = o tanh(c')` (Shi et al. 2015, without peepholes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxscript import ir

from stepcell.exporter.cell_recognition.algebra import Algebra, Polynomial
from stepcell.exporter.cell_recognition.layout import channel_range, is_float_cast, uncast

__all__ = ["Activation", "Gru", "Lstm", "activation", "gru_at", "lstm_at"]

_GATES = {"Sigmoid": "sigmoid", "HardSigmoid": "hard sigmoid", "Clip[0,1]": "hard sigmoid"}
_CANDIDATES = {"Tanh": "tanh", "Clip[-1,1]": "hard tanh"} | {
    op: op for op in ("Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Selu", "Softsign", "Softplus", "Mish", "HardSwish")
}


@dataclass(frozen=True, eq=False)
class Activation:
    """A gate or candidate: a range of channels of an element-wise function.

    Attributes:
        role: "gate" for functions onto 0 to 1, else "candidate".
        kind: "sigmoid", "tanh" and what else can stand in their place.
        argument: the pre-activation, of which it takes channels `start` to `stop`; None: all.
    """

    role: str
    kind: str
    argument: ir.Value
    channels: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Gru:
    """`h' = (1 - z) h + z n`; with `keeps`: `h' = z h + (1 - z) n`."""

    z: Activation
    n: Activation
    h: ir.Value
    after: ir.Value
    keeps: bool


@dataclass(frozen=True, eq=False)
class Lstm:
    """`c' = f c + i g` and `h' = o output`, where `output` is the tanh of c'."""

    i: Activation
    f: Activation
    o: Activation
    g: Activation
    output: Activation
    c: ir.Value
    c_after: ir.Value
    after: ir.Value


def activation(value: ir.Value) -> Activation | None:
    """The activation that a value is, or is some channels of."""
    channels = None
    value = uncast(value)
    if (selected := channel_range(value)) is not None:
        value, channels = uncast(selected[0]), selected[1:]
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None:
        return None
    op = node.op_type
    if op == "Clip":
        low, high = _bounds(node)
        op = f"Clip[{low:g},{high:g}]"
    role = "gate" if op in _GATES else "candidate"
    kind = _GATES.get(op) or _CANDIDATES.get(op)
    return Activation(role, kind, node.inputs[0], channels) if kind else None


def gru_at(value: ir.Value, algebra: Algebra) -> Gru | None:
    """The blend whose result is this value, if it is one."""
    blend = algebra.expand(value)
    gates, candidates = _activations(blend)
    for z_value, z in gates.items():
        rest, share = blend.split(z_value)
        for n_value, n in candidates.items():
            new = Polynomial.of(n_value)
            if share == new - rest:
                old, keeps = rest, False
            elif rest == new:
                old, keeps = share + new, True
            else:
                continue
            h = algebra.value_of(old)
            if h is not None:
                return Gru(z, n, h, value, keeps)
    return None


def lstm_at(value: ir.Value, algebra: Algebra) -> Lstm | None:
    """The cell whose new c is this value, if it is one."""
    total = algebra.expand(value)
    gates, candidates = _activations(total)
    for g_value, g in candidates.items():
        rest, share = total.split(g_value)
        for i_value, i in gates.items():
            if share != Polynomial.of(i_value):
                continue
            for f_value, f in gates.items():
                none, old = rest.split(f_value)
                c = algebra.value_of(old)
                if none.terms or not rest.terms or c is None:
                    continue
                for after, o, output in _outputs(value, algebra):
                    return Lstm(i, f, o, g, output, c, value, after)
    return None


def _outputs(c_after: ir.Value, algebra: Algebra) -> Iterator[tuple[ir.Value, Activation, Activation]]:
    """Every `o * act(c')`: the value, o and act."""
    for squashed in _results(c_after):
        squash = activation(squashed)
        if squash is None or squash.role != "candidate" or squash.channels or uncast(squash.argument) is not c_after:
            continue
        for after in _results(squashed):
            product = algebra.expand(after)
            for atom, gate in _activations(product)[0].items():
                if product == Polynomial.of(atom, squashed):
                    yield after, gate, squash


def _results(value: ir.Value) -> Iterator[ir.Value]:
    """Outputs of the nodes that read a value, through conversions of its dtype."""
    for node in value.consumers():
        for output in node.outputs:
            if is_float_cast(node):
                yield from _results(output)
            yield output


def _activations(polynomial: Polynomial) -> tuple[dict[ir.Value, Activation], dict[ir.Value, Activation]]:
    """The gates and the candidates among a polynomial's atoms."""
    gates: dict[ir.Value, Activation] = {}
    candidates: dict[ir.Value, Activation] = {}
    for atom in polynomial.atoms:
        if (found := activation(atom)) is not None:
            (gates if found.role == "gate" else candidates)[atom] = found
    return gates, candidates


def _bounds(node: ir.Node) -> tuple[float, float]:
    """Limits of a Clip; attributes before opset 11."""
    given = [node.attributes.get_float(name, float("nan")) for name in ("min", "max")]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None and value.const_value is not None:
            given[index] = float(value.const_value.numpy().item())
    return given[0], given[1]
