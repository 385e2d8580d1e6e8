"""Find ConvGRU and ConvLSTM cells in a normalised graph.

The gating says which values are gates and states (`skeleton`), the sums behind the gates say which
convolutions they take (`affine`). A cell is taken only if the op computes exactly the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from onnxscript import ir

from stepcell.exporter.cell_recognition.affine import Affine, AffineReader
from stepcell.exporter.cell_recognition.algebra import Algebra
from stepcell.exporter.cell_recognition.cell import Cell, NearMiss, Weights
from stepcell.exporter.cell_recognition.hidden import hidden_state
from stepcell.exporter.cell_recognition.layout import uncast
from stepcell.exporter.cell_recognition.origin import cell_name, descendants, first_kernel, is_made_inside, obstacle
from stepcell.exporter.cell_recognition.skeleton import Activation, Gru, Lstm, activation, gru_at, lstm_at
from stepcell.exporter.cell_recognition.weights import NotACell, Packed, inputs_of

__all__ = ["find_cells"]

Kind = Literal["ConvGRU", "ConvLSTM"]


def find_cells(model: ir.Model) -> tuple[list[Cell], list[NearMiss]]:
    """The cells of a normalised model that an op can replace, and those left alone; in graph order."""
    algebra = Algebra()
    cells: list[Cell] = []
    misses: list[NearMiss] = []
    outputs: dict[ir.Value, ir.Value] = {}  # h' by c' of the LSTMs so far
    for node in model.graph:
        if node.op_type not in ("Add", "Sub") or node.domain:
            continue
        value = node.outputs[0]
        found = gru_at(value, algebra) or lstm_at(value, algebra)
        if found is None or (isinstance(found, Gru) and not _is_recurrent(found)):
            continue
        taken = [*(cell.name for cell in cells), *(miss.name for miss in misses)]
        name = cell_name(found.after, taken, len(taken))
        try:
            if isinstance(found, Gru):
                cells.append(_conv_gru(name, found, algebra))
            else:
                cells.append(_conv_lstm(name, found, algebra, outputs.get(found.c), model.graph))
        except NotACell as reason:
            misses.append(_near_miss(name, found, str(reason)))
        algebra.make_atom(found.after)
        if isinstance(found, Lstm):
            algebra.make_atom(found.c_after)
            outputs[found.c_after] = found.after
    return cells, misses


def _is_recurrent(found: Gru) -> bool:
    """Whether gate and candidate see the old state: a blend by any other mask is no cell."""
    seen = descendants(found.h)
    return found.z.argument in seen and found.n.argument in seen


def _conv_gru(name: str, found: Gru, algebra: Algebra) -> Cell:
    h = found.h
    _check_kinds([found.z], [found.n])
    _check_states([h])
    seen = descendants(h)
    reader = AffineReader(lambda value: value in seen and value is not h)
    z, n = _gate(found.z, reader), _gate(found.n, reader)
    product, reset = _reset(n, h, algebra, reader, seen)
    _check_kinds([reset], [])
    r = _gate(reset, reader)
    if any(uncast(source) is h for source in n.kernels):
        raise NotACell("the candidate also sees the state without the reset gate")
    _check_sources([z, r, n], {h, product}, seen, found.after, reader)
    notes = []
    if found.keeps:  # 1 - sigmoid(a) = sigmoid(-a)
        z = z.scaled(-np.ones(z.channels))
        notes.append("update gate negated")
    packed = Packed([z, r, n], [h, product])
    weights = (
        packed.input_weights(),
        packed.bias(),
        packed.state_weights(h, [z, r]),
        packed.state_weights(product, [n]),
    )
    return _cell(name, "ConvGRU", packed, ((h, found.after),), weights, notes)


def _conv_lstm(name: str, found: Lstm, algebra: Algebra, partner: ir.Value | None, graph: ir.Graph) -> Cell:
    c = found.c
    parts = (found.i, found.f, found.o, found.g)
    _check_kinds(parts[:3], [found.g, found.output])
    _check_states([c])
    everything = AffineReader(lambda value: value not in algebra.states)
    sums = [_gate(part, everything) for part in parts]
    direct = [source for gate in sums for source in gate.maps]
    if any({c, found.c_after} & set(algebra.expand(source).atoms) for source in direct):
        raise NotACell("peephole terms: the cell state enters a gate directly")
    h = hidden_state(sums, found, partner, graph)
    if h is None:
        raise NotACell(obstacle(direct[0], everything.refused) if direct else "no hidden state enters the gates")
    _check_states([h])
    seen = descendants(h)
    reader = AffineReader(lambda value: value in seen and value is not h)
    gates = [_gate(part, reader) for part in parts]
    _check_sources(gates, {h}, seen, found.c_after, reader)
    if all(uncast(source) is not h for gate in gates for source in gate.kernels):
        raise NotACell(obstacle(found.f.argument, reader.refused))
    packed = Packed(gates, [h])
    weights = (packed.input_weights(), packed.bias(), packed.state_weights(h, gates))
    return _cell(name, "ConvLSTM", packed, ((h, found.after), (c, found.c_after)), weights, [])


def _reset(
    n: Affine, h: ir.Value, algebra: Algebra, reader: AffineReader, seen: set[ir.Value]
) -> tuple[ir.Value, Activation]:
    """The product r * h that the candidate's convolution reads, and r."""
    old = algebra.expand(h)
    for source in n.kernels:
        product = algebra.expand(source)
        for atom in product.atoms:
            rest, share = product.split(atom)
            gate = activation(atom)
            if gate is None or gate.role != "gate" or rest.terms:
                continue
            if share == old:
                return uncast(source), gate
            if source in n.maps and set(share.atoms) & seen:
                raise NotACell("the reset gate is applied after the recurrent convolution")
    for source in n.kernels:
        if source in seen and uncast(source) is not h:
            raise NotACell(obstacle(source, reader.refused))
    raise NotACell("the candidate sees the state without a reset gate")


def _gate(part: Activation, reader: AffineReader) -> Affine:
    """The sum behind a gate.

    Raises:
        NotACell: its channels are not known.
    """
    try:
        whole = reader.read(part.argument)
    except ValueError as error:
        raise NotACell(str(error)) from None
    return whole.rows(*part.channels) if part.channels is not None else whole


def _check_kinds(gates: Sequence[Activation], candidates: Sequence[Activation]) -> None:
    for part in (*gates, *candidates):
        if part.kind.startswith("hard"):
            raise NotACell(f"hard gates: {part.kind} in place of {part.kind.removeprefix('hard ')}")
        if part.role == "candidate" and part.kind != "tanh":
            raise NotACell(f"the candidate or the output takes {part.kind}, and not tanh")


def _check_states(states: Sequence[ir.Value]) -> None:
    for state in states:
        if is_made_inside(state):
            raise NotACell("the hidden state is made inside the graph; there is no state input")
        if state.shape is not None and len(state.shape) != 4:
            raise NotACell(f"the state {state.name} has rank {len(state.shape)}, and is no map [N, C, H, W]")


def _check_sources(
    gates: Sequence[Affine], states: set[ir.Value], seen: set[ir.Value], after: ir.Value, reader: AffineReader
) -> None:
    """What is no state must not depend on it where it enters a gate as it is."""
    if len({gate.channels for gate in gates}) > 1:
        raise NotACell(f"its gates have several widths ({', '.join(str(gate.channels) for gate in gates)})")
    later = descendants(after)
    for gate in gates:
        for source in gate.kernels:
            if uncast(source) in states:
                continue
            if source in gate.maps and source in seen:
                raise NotACell(obstacle(source, reader.refused))
            if source in later:
                raise NotACell("a gate sees the new state")


def _cell(
    name: str,
    op: Kind,
    packed: Packed,
    states: tuple[tuple[ir.Value, ir.Value], ...],
    weights: Weights,
    notes: list[str],
) -> Cell:
    before, after = states[0]
    x = inputs_of(packed, before)
    hidden = weights[-1].shape[1]
    width = before.shape[1] if before.shape is not None else hidden
    if isinstance(width, int) and width != hidden:
        raise NotACell(f"the state {before.name} has {width} channels, and its gates have {hidden}")
    if after.dtype not in (before.dtype, x[0].dtype):
        raise NotACell(f"the new state is {after.dtype}, and neither the old state nor the input is")
    assert x[0].dtype is not None  # checked by inputs_of
    dtype = x[0].dtype.numpy()
    note = "; ".join([*notes, *packed.notes()]) or None
    return Cell(name, op, hidden, packed.kernel, states, x, tuple(w.astype(dtype) for w in weights), note)


def _near_miss(name: str, found: Gru | Lstm, reason: str) -> NearMiss:
    if isinstance(found, Gru):
        kind: Kind = "ConvGRU"
        gates, state = [found.z, found.n], found.h
    else:
        kind = "ConvLSTM"
        gates, state = [found.i, found.f, found.o, found.g], found.c
    widths = [gate.channels[1] - gate.channels[0] for gate in gates if gate.channels is not None]
    for value in (gates[0].argument, state):
        if value.shape is not None and len(value.shape) > 1 and isinstance(size := value.shape[1], int):
            widths.append(size)
    return NearMiss(name, kind, (widths or [0])[0], first_kernel(gate.argument for gate in gates), reason)
