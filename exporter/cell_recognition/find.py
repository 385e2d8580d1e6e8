"""Recogniser of ConvGRU and ConvLSTM cells, dense GRU and LSTM included, in a normalised ONNX graph.

The gate equations determine which values are gates and states (`gating`); the sums behind the gates
determine the convolutions that they take (`affine`). A cell is taken only if its op computes
exactly the same; otherwise it is a near miss with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from onnxscript import ir

from stepcell.exporter.cell_recognition.activations import Activation, activation
from stepcell.exporter.cell_recognition.affine import Affine, AffineReader
from stepcell.exporter.cell_recognition.cell import GateWeights, NearMiss, NotACell, RecognisedCell, inputs_of
from stepcell.exporter.cell_recognition.convolution import diagonal_of
from stepcell.exporter.cell_recognition.gating import Gru, Lstm, gru_at, lstm_at
from stepcell.exporter.cell_recognition.graph_walk import (
    descendants,
    first_kernel,
    is_made_inside,
    module_path,
    obstacle,
)
from stepcell.exporter.cell_recognition.hidden_state import hidden_state
from stepcell.exporter.cell_recognition.peephole import peephole_weights, split_peephole
from stepcell.exporter.cell_recognition.polynomial import Algebra
from stepcell.exporter.cell_recognition.values import Array, channel_count, rank, uncast
from stepcell.ops import Gates, OpName, Reset

__all__ = ["find_cells"]

States = tuple[tuple[ir.Value, ir.Value], ...]


def find_cells(model: ir.Model) -> tuple[list[RecognisedCell], list[NearMiss]]:
    """The cells of a normalised model that an op can replace, and those that are kept as they are; in graph order."""
    algebra = Algebra()
    cells: list[RecognisedCell] = []
    misses: list[NearMiss] = []
    outputs: dict[ir.Value, ir.Value] = {}  # h' by c' of the LSTMs so far
    for node in model.graph:
        if node.op_type not in ("Add", "Sub") or node.domain:
            continue
        value = node.outputs[0]
        found = gru_at(value, algebra) or lstm_at(value, algebra)
        if found is None or (isinstance(found, Gru) and not _is_recurrent(found)):
            continue
        name = _unused_name(module_path(found.after), [*(cell.name for cell in cells), *(miss.name for miss in misses)])
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


def _unused_name(path: str, taken: Sequence[str]) -> str:
    name = path or f"cell{len(taken)}"
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def _is_recurrent(found: Gru) -> bool:
    """Whether gate and candidate depend on the old state: a blend by any other mask is not a cell."""
    seen = descendants(found.h)
    return found.z.argument in seen and found.n.argument in seen


def _conv_gru(name: str, found: Gru, algebra: Algebra) -> RecognisedCell:
    h = found.h
    _kind_of([found.z], [found.n])
    _check_states([h])
    seen = descendants(h)
    reader = AffineReader(lambda value: value in seen, frozenset({h}))
    z, n = _gate(found.z, reader), _gate(found.n, reader)
    applied_after = _reset_after(n, h, algebra, reader)
    if applied_after is not None:
        source, reset, recurrent = applied_after
        n, product = n.without(source), h
    else:
        product, reset = _reset_before(n, h, algebra, reader, seen)
        recurrent = n
    gates = _kind_of([found.z, reset], [found.n])
    r = _gate(reset, reader)
    if any(uncast(each) is h for each in n.kernels):
        raise NotACell("the candidate also sees the state without the reset gate")
    _check_sources([z, r, n], {h, product}, seen, found.after, reader)
    notes = []
    if found.keeps:  # 1 - sigmoid(a) = sigmoid(-a), hard or not
        z = z.scaled(-1.0)
        notes.append("update gate negated")
    packed = GateWeights([z, r, n], [h, product], [recurrent])
    arrays = [packed.of_inputs(), packed.bias(), packed.of_state(h, [z, r]), packed.of_state(product, [recurrent])]
    if applied_after is not None:
        arrays.append(recurrent.bias)
    placement: Reset = "after" if applied_after is not None else "before"
    return _cell(name, packed, ((h, found.after),), arrays, notes, reset=placement, gates=gates)


def _conv_lstm(name: str, found: Lstm, algebra: Algebra, partner: ir.Value | None, graph: ir.Graph) -> RecognisedCell:
    c = found.c
    gates = _kind_of(found.gates[:3], [found.g, found.output])
    _check_states([c])
    cell_states = frozenset({c, found.c_after})
    everything = AffineReader(lambda value: value not in algebra.states, cell_states)
    sums, _ = _without_peepholes(found, everything)
    direct = [source for gate in sums for source in gate.maps]
    if any(cell_states & set(algebra.expand(source).atoms) for source in direct):
        raise NotACell("the cell state enters a gate in another way than as peephole")
    h = hidden_state(sums, found, partner, graph)
    if h is None:
        raise NotACell(obstacle(direct[0], everything.refused) if direct else "no hidden state enters the gates")
    _check_states([h])
    if rank(h) != rank(c):
        raise NotACell(f"the hidden state has {rank(h)} axes, and the cell state has {rank(c)}")
    seen = descendants(h)
    reader = AffineReader(lambda value: value in seen, cell_states | {h})
    parts, peepholes = _without_peepholes(found, reader)
    _check_sources(parts, {h}, seen, found.c_after, reader)
    if all(uncast(source) is not h for gate in parts for source in gate.kernels):
        raise NotACell(obstacle(found.f.argument, reader.refused))
    packed = GateWeights(parts, [h])
    arrays = [packed.of_inputs(), packed.bias(), packed.of_state(h, parts)]
    peephole = peephole_weights(peepholes, c)
    if peephole is not None:
        arrays.append(peephole)
    states = ((h, found.after), (c, found.c_after))
    return _cell(name, packed, states, arrays, [], gates=gates, peephole=peephole is not None)


def _without_peepholes(found: Lstm, reader: AffineReader) -> tuple[list[Affine], list[Array | None]]:
    """The sums behind i, f, o and g without the peephole terms, and those of i, f and o."""
    sums, peepholes = [], []
    memories = (found.c, found.c, found.c_after, None)
    for gate, memory in zip(found.gates, memories, strict=True):
        total, weight = split_peephole(_gate(gate, reader), memory)
        sums.append(total)
        peepholes.append(weight)
        if any(uncast(source) in (found.c, found.c_after) for source in total.kernels):
            where = "the candidate sees" if memory is None else "the output gate sees the old value of"
            raise NotACell(f"{where} the cell state, which is no peephole of the op")
    return sums, peepholes[:3]


def _reset_after(
    n: Affine, h: ir.Value, algebra: Algebra, reader: AffineReader
) -> tuple[ir.Value, Activation, Affine] | None:
    """For a candidate `n = tanh(... + r (W_n * h + b))`: the product with r, r, and `W_n * h + b`; otherwise None."""
    for source in n.maps:
        node = uncast(source).producer()
        scale = diagonal_of(n.kernels[source])
        if node is None or node.op_type != "Mul" or scale is None:
            continue
        for gate_value, other in (node.inputs, node.inputs[::-1]):
            if gate_value is None or other is None or algebra.expand(other) == algebra.expand(h):
                continue
            gate = activation(gate_value)
            if gate is None or gate.role != "gate":
                continue
            product = _read(other, reader)
            if product.kernels and all(uncast(each) is h for each in product.kernels):
                return source, gate, product.scaled(scale)
    return None


def _reset_before(
    n: Affine, h: ir.Value, algebra: Algebra, reader: AffineReader, seen: set[ir.Value]
) -> tuple[ir.Value, Activation]:
    """The product r * h that the candidate's convolution reads, and r."""
    old = algebra.expand(h)
    for source in n.kernels:
        product = algebra.expand(source)
        for atom in product.atoms:
            rest, share = product.split(atom)
            gate = activation(atom)
            if gate is not None and gate.role == "gate" and not rest.terms and share == old:
                return uncast(source), gate
    for source in n.kernels:
        if source in seen and uncast(source) is not h:
            raise NotACell(obstacle(source, reader.refused))
    raise NotACell("the candidate sees the state without a reset gate")


def _gate(part: Activation, reader: AffineReader) -> Affine:
    """The pre-activation of a gate as the op takes it."""
    whole = _read(part.argument, reader)
    rows = whole.rows(*part.channels) if part.channels is not None else whole
    return rows.scaled(part.scale, part.offset)


def _read(value: ir.Value, reader: AffineReader) -> Affine:
    try:
        return reader.read(value)
    except ValueError as error:  # its channels are not known
        raise NotACell(str(error)) from None


def _kind_of(gates: Sequence[Activation], candidates: Sequence[Activation]) -> Gates:
    """The kind of all gates and candidates, which is one attribute of the op."""
    for part in candidates:
        if part.kind not in ("tanh", "hard tanh"):
            raise NotACell(f"the candidate or the output takes {part.kind}, and not tanh")
    kinds = {part.kind for part in (*gates, *candidates)}
    hard = {kind for kind in kinds if kind.startswith("hard")}
    if hard and hard != kinds:
        raise NotACell(f"hard gates beside soft ones ({', '.join(sorted(kinds))}); the op has gates of one kind")
    return "hard" if hard else "soft"


def _check_states(states: Sequence[ir.Value]) -> None:
    for state in states:
        if is_made_inside(state):
            raise NotACell("the hidden state is made inside the graph; there is no state input")
        if rank(state) not in (2, 4):
            raise NotACell(
                f"the state {state.name} has {rank(state)} axes; a cell has features [N, C] or maps [N, C, H, W]"
            )


def _check_sources(
    gates: Sequence[Affine], states: set[ir.Value], seen: set[ir.Value], after: ir.Value, reader: AffineReader
) -> None:
    """A source that is not a state must not depend on the state."""
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
    packed: GateWeights,
    states: States,
    arrays: Sequence[Array],
    notes: Sequence[str],
    *,
    gates: Gates,
    reset: Reset | None = None,
    peephole: bool = False,
) -> RecognisedCell:
    before, after = states[0]
    x = inputs_of(packed, before)
    hidden = arrays[2].shape[1]
    width = channel_count(before)
    if width is not None and width != hidden:
        raise NotACell(f"the state {before.name} has {width} channels, and its gates have {hidden}")
    if after.dtype not in (before.dtype, x[0].dtype):
        raise NotACell(f"the new state is {after.dtype}, and neither the old state nor the input is")
    assert x[0].dtype is not None  # checked by inputs_of
    dtype = x[0].dtype.numpy()
    return RecognisedCell(
        name=name,
        path=module_path(after),
        op="ConvGRU" if reset else "ConvLSTM",
        hidden=hidden,
        kernel=packed.kernel,
        states=states,
        x=x,
        weights=tuple(array.astype(dtype) for array in arrays),
        reset=reset,
        gates=gates,
        peephole=peephole,
        note="; ".join([*notes, *packed.notes()]) or None,
    )


def _near_miss(name: str, found: Gru | Lstm, reason: str) -> NearMiss:
    state, new = (found.h, found.after) if isinstance(found, Gru) else (found.c, found.c_after)
    widths = [gate.channels[1] - gate.channels[0] for gate in found.gates if gate.channels is not None]
    widths += [size for value in (found.gates[0].argument, state) if (size := channel_count(value)) is not None]
    kernel = first_kernel(gate.argument for gate in found.gates)
    kind: OpName = "ConvGRU" if isinstance(found, Gru) else "ConvLSTM"
    return NearMiss(name, kind, (widths or [0])[0], kernel, reason, ((state, new),), found.after)
