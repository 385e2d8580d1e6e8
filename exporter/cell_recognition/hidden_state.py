"""Choice of the hidden state among the values that enter an LSTM's gates.

The gate equations determine c, but not h: to the arithmetic h is one more input. Any choice gives
the same numbers; it decides which output of the graph is reported as the next value of which input.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnxscript import ir

from stepcell.exporter.cell_recognition.affine import Affine
from stepcell.exporter.cell_recognition.gating import Lstm
from stepcell.exporter.cell_recognition.graph_walk import ancestors, descendants
from stepcell.exporter.cell_recognition.values import channel_count, uncast

__all__ = ["hidden_state"]

_DEPTH = 4
_WORDS = re.compile(r"[a-z]+")
_DIRECTIONS = {"in", "out", "next", "new", "prev", "past", "present", "output", "input", "n"}


def hidden_state(gates: Sequence[Affine], found: Lstm, partner: ir.Value | None, graph: ir.Graph) -> ir.Value | None:
    """The source that is h, or None if the likeliest candidate does not enter the gates by convolution.

    Args:
        partner: in a chain of cells, h' of the cell whose c' is this cell's c.
    """
    width = gates[0].channels
    later = descendants(found.c_after)
    direct = [uncast(s) for gate in gates for s in gate.kernels if s not in gate.maps]
    hidden_behind = [v for gate in gates for s in gate.maps for v in ancestors(s) if v.is_graph_input()]
    candidates = [
        v
        for v in dict.fromkeys((*direct, *hidden_behind))
        if channel_count(v) == width and v not in later and v is not found.c
    ]
    if not candidates:
        return None
    best = min(candidates, key=lambda v: _unlikeness(v, found, partner, graph))
    return best if best in direct else None


def _unlikeness(value: ir.Value, found: Lstm, partner: ir.Value | None, graph: ir.Graph) -> tuple[float, ...]:
    """Sort key of the candidates for the h beside a c; the smallest is the likeliest."""
    name, c_name = _input_name(value), _input_name(found.c)
    inputs = [v.name for v in graph.inputs]
    distance = abs(inputs.index(name) - inputs.index(c_name)) if name in inputs and c_name in inputs else len(inputs)
    return (
        value is not partner,
        _made_of(value) != _made_of(found.c),  # both graph inputs, or both an input times a mask
        not _words(name) & _words(found.after.name),
        -len(_words(name) & _words(c_name)),
        distance,
    )


def _made_of(value: ir.Value, depth: int = _DEPTH) -> tuple[object, ...]:
    """The operations that make a value, without names."""
    node = value.producer()
    if node is None or depth == 0:
        return (value.is_graph_input(),)
    return (node.op_type, *(_made_of(v, depth - 1) for v in node.inputs if v is not None))


def _input_name(value: ir.Value) -> str | None:
    return next((v.name for v in ancestors(value) if v.is_graph_input()), None)


def _words(name: str | None) -> set[str]:
    return set(_WORDS.findall((name or "").lower())) - _DIRECTIONS
