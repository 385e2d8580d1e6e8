"""Element-wise arithmetic of a graph as polynomials, which makes equal formulas equal objects.

`(1 - z) * h + z * n`, `h + z * (n - h)` and `n * z - (h * z - h)` are one polynomial in z, n and h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.activations import activation
from stepcell.exporter.cell_recognition.values import is_float_cast

__all__ = ["Algebra", "Polynomial"]

Monomial = tuple[ir.Value, ...]  # sorted by identity, with repetitions
_LIMIT = 16  # monomials; a longer sum does not belong to a cell


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of values of the graph, with its coefficients."""

    terms: dict[Monomial, float]

    @classmethod
    def of(cls, *factors: ir.Value) -> Polynomial:
        """The product of some values."""
        return cls({tuple(sorted(factors, key=id)): 1.0})

    @property
    def atoms(self) -> list[ir.Value]:
        return list(dict.fromkeys(value for monomial in self.terms for value in monomial))

    def __add__(self, other: Polynomial) -> Polynomial:
        total = dict(self.terms)
        for monomial, factor in other.terms.items():
            total[monomial] = total.get(monomial, 0.0) + factor
        return Polynomial({monomial: factor for monomial, factor in total.items() if factor != 0.0})

    def __neg__(self) -> Polynomial:
        return Polynomial({monomial: -factor for monomial, factor in self.terms.items()})

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + -other

    def __mul__(self, other: Polynomial) -> Polynomial:
        total = Polynomial({})
        for a, p in self.terms.items():
            for b, q in other.terms.items():
                total += Polynomial({tuple(sorted((*a, *b), key=id)): p * q})
        return total

    def split(self, atom: ir.Value) -> tuple[Polynomial, Polynomial]:
        """A and B of A + atom * B, where B may hold the atom again."""
        rest: dict[Monomial, float] = {}
        share: dict[Monomial, float] = {}
        for monomial, factor in self.terms.items():
            if atom in monomial:
                index = monomial.index(atom)
                share[monomial[:index] + monomial[index + 1 :]] = factor
            else:
                rest[monomial] = factor
        return Polynomial(rest), Polynomial(share)


class Algebra:
    """Polynomials of the values of one graph; a value that is no sum or product, or is an activation, is an atom."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Polynomial] = {}
        self.states: set[ir.Value] = set()

    def make_atom(self, value: ir.Value) -> None:
        """Stop expanding this value: it is the new state of a cell."""
        self._known = {value: Polynomial.of(value)} | {v: p for v, p in self._known.items() if p.terms.keys() == {(v,)}}
        self._known[value] = Polynomial.of(value)
        self.states.add(value)

    def expand(self, value: ir.Value) -> Polynomial:
        if value not in self._known:
            found = self._expand(value)
            self._known[value] = Polynomial.of(value) if len(found.terms) > _LIMIT else found
        return self._known[value]

    def value_of(self, polynomial: Polynomial) -> ir.Value | None:
        """The first value found to have this polynomial."""
        return next((value for value, known in self._known.items() if known == polynomial), None)

    def _expand(self, value: ir.Value) -> Polynomial:
        number = _number(value)
        if number is not None:
            return Polynomial({(): number} if number else {})
        node = value.producer()
        inputs = [v for v in node.inputs if v is not None] if node is not None else []
        if node is None or node.domain or not inputs:
            return Polynomial.of(value)
        if node.op_type in ("Add", "Sub", "Mul") and activation(value) is not None:  # Relu6(x + 3) * (1 / 6)
            return Polynomial.of(value)
        match node.op_type:
            case "Add":
                return self.expand(inputs[0]) + self.expand(inputs[1])
            case "Sub":
                return self.expand(inputs[0]) - self.expand(inputs[1])
            case "Mul":
                a, b = self.expand(inputs[0]), self.expand(inputs[1])
                return a * b if len(a.terms) * len(b.terms) <= _LIMIT else Polynomial.of(value)
            case "Neg":
                return -self.expand(inputs[0])
            case "Identity":
                return self.expand(inputs[0])
            case "Cast" if is_float_cast(node):
                return self.expand(inputs[0])
            case _:
                return Polynomial.of(value)


def _number(value: ir.Value) -> float | None:
    """A scalar, or a tensor of one repeated number other than 0: a map of zeros may be a state."""
    tensor: ir.TensorProtocol | None = value.const_value
    node = value.producer()
    filled = tensor is None and node is not None and node.op_type == "ConstantOfShape"
    if filled and node is not None and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
    if tensor is None:
        return None
    array = np.asarray(tensor.numpy())
    if array.size == 0 or not np.issubdtype(array.dtype, np.floating):
        return None
    first = float(array.flat[0])
    if first == 0.0 and (filled or array.size > 1):
        return None
    return first if bool((array == array.flat[0]).all()) else None
