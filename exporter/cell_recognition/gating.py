"""Gate equations of recurrent cells: finds which values are gates, candidates and states.

ConvGRU: `h' = (1 - z) h + z n` (Ballas et al. 2016), or with z on the other side (Cho et al. 2014).
ConvLSTM: `c' = f c + i g` and `h' = o tanh(c')` (Shi et al. 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxscript import ir

from stepcell.exporter.cell_recognition.activations import Activation, activation
from stepcell.exporter.cell_recognition.polynomial import Algebra, Polynomial
from stepcell.exporter.cell_recognition.values import is_float_cast, uncast

__all__ = ["Gru", "Lstm", "gru_at", "lstm_at"]


@dataclass(frozen=True, eq=False)
class Gru:
    """`h' = (1 - z) h + z n`; with `keeps`: `h' = z h + (1 - z) n`."""

    z: Activation
    n: Activation
    h: ir.Value
    after: ir.Value
    keeps: bool

    @property
    def gates(self) -> tuple[Activation, ...]:
        return self.z, self.n


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

    @property
    def gates(self) -> tuple[Activation, ...]:
        return self.i, self.f, self.o, self.g


def gru_at(value: ir.Value, algebra: Algebra) -> Gru | None:
    """The GRU whose new state is this value, if there is one."""
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
    """The LSTM whose new c is this value, if there is one."""
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
        if (
            squash is None
            or squash.role != "candidate"
            or not squash.is_plain
            or uncast(squash.argument) is not c_after
        ):
            continue
        for after in _results(squashed):
            product = algebra.expand(after)
            for atom, gate in _activations(product)[0].items():
                if product == Polynomial.of(atom, squashed):
                    yield after, gate, squash


def _results(value: ir.Value) -> Iterator[ir.Value]:
    """Outputs of the nodes that read a value, through casts and through the parts of a hard activation."""
    for node in value.consumers():
        for output in node.outputs:
            if is_float_cast(node) or node.op_type in ("Max", "Min", "Clip", "Relu"):
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
