"""Find the ConvGRU or ConvLSTM that a module computes: its convolutions propose, the numbers decide.

The module is called once with random tensors. Its linear maps are cut into blocks of as many
channels as the state has; every assignment of blocks to gates, in every order, with both update
rules and both placements of the reset gate, is compared with what the module returned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stepcell.exporter.from_module.calls import Call
from stepcell.exporter.from_module.gates import Term, gru_cell, lstm_cell
from stepcell.exporter.from_module.recorder import LinearMap, Recorder
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, Gates, Reset

__all__ = ["as_map", "close", "propose"]

Cell = ConvGRUCell | ConvLSTMCell
_SOFT: tuple[Gates, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = ("soft", torch.sigmoid, torch.tanh)
_HARD: tuple[Gates, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = (
    "hard",
    lambda x: (0.5 * x + 0.5).clamp(0, 1),
    lambda x: x.clamp(-1, 1),
)


@dataclass(frozen=True)
class _Block:
    """C rows of a linear map and what they gave."""

    term: Term
    value: Tensor


@dataclass
class _Blocks:
    """Blocks by what they read: x and h, x, h, or u (with or without x), which is r . h in a ConvGRU."""

    joint: list[_Block] = field(default_factory=list)
    x: list[_Block] = field(default_factory=list)
    h: list[_Block] = field(default_factory=list)
    u: list[_Block] = field(default_factory=list)
    product: Tensor | None = None

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return len(self.joint), len(self.x), len(self.h), len(self.u)


def propose(module: nn.Module, call: Call) -> tuple[Cell, tuple[int, ...]] | str:
    """The canonical cell that gives what `module` gives, and the positions of x, h (and c) among its leaves.

    Returns:
        Or why there is none.
    """
    if any(call.frame(call.leaves[position]).dim() == 5 for position in call.tensors):
        return "is called with clips of its own"
    if len(call.tensors) not in (2, 3):
        return f"takes {len(call.tensors)} tensors, a cell takes x and h, or x, h and c"
    try:
        leaves, results, maps = _run(module, call, small=True)
    except Exception:  # a cell may be made for one size of map
        leaves, results, maps = _run(module, call, small=False)
    if not maps:
        return "no convolution and no matrix product was seen in it"
    reasons = []
    for order in itertools.permutations(call.tensors):
        x, h, *c = (call.frame(leaves[position]) for position in order)
        targets = [call.frame(result) for result in results if isinstance(result, Tensor)]
        targets = [target for target in targets if target.shape == h.shape]
        if not targets or any(x.dim() != 4 or x.shape[2:] != h.shape[2:] for x in (x, *c)):
            continue
        blocks = _cut(maps, x, h)
        if isinstance(blocks, str):
            reasons.append(blocks)
            continue
        cell = _lstm(blocks, c[0], targets, _peepholes(module, h)) if c else _gru(blocks, h, targets)
        if cell is not None:
            return cell, order
        reasons.append("its gates fit no known order, update rule or reset placement")
    return min(reasons, key=len) if reasons else "returns nothing of its state's shape"


def as_map(tensor: Tensor) -> Tensor:
    """Features (N, F) as maps of one pixel (N, F, 1, 1); anything else as it is."""
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of float64."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-10 * (1 + other.abs().max()))


def _run(module: nn.Module, call: Call, *, small: bool) -> tuple[list[Tensor], list[Tensor], list[LinearMap]]:
    leaves = call.random(0, small=small)
    # An in-place cell writes into its own copies.
    given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    with Recorder() as recorder:
        results = call.evaluate(module, given)
    return leaves, results, recorder.maps


def _cut(maps: Sequence[LinearMap], x: Tensor, h: Tensor) -> _Blocks | str:
    found, inputs, hidden = _Blocks(), x.shape[1], h.shape[1]
    for each in maps:
        if each.flaw is not None:
            return f"a convolution with {each.flaw}"
        source, weight = as_map(each.input), each.weight
        rest: Tensor | None = None  # what it reads beside x
        if source.shape[1] == inputs and torch.equal(source, x):
            over_x, over_h = weight, None
        elif source.shape[1] == inputs + hidden and torch.equal(source[:, :inputs], x):
            over_x, over_h, rest = weight[:, :inputs], weight[:, inputs:], source[:, inputs:]
        elif source.shape[1] == inputs + hidden and torch.equal(source[:, hidden:], x):
            over_x, over_h, rest = weight[:, hidden:], weight[:, :hidden], source[:, :hidden]
        elif source.shape[1] == hidden:
            over_x, over_h, rest = None, weight, source
        else:
            return "a convolution reads something else than x, h and r . h"
        if rest is None:
            target = found.x
        elif torch.equal(rest, h):
            target = found.h if over_x is None else found.joint
        elif found.product is None or torch.equal(found.product, rest):
            target, found.product = found.u, rest
        else:
            return "its convolutions read more than x, h and r . h"
        if weight.shape[0] % hidden:
            return f"a convolution of {weight.shape[0]} outputs holds no whole number of gates of {hidden}"
        for row in range(0, weight.shape[0], hidden):
            rows = slice(row, row + hidden)
            term = Term(
                None if over_x is None else over_x[rows],
                None if over_h is None else over_h[rows],
                None if each.bias is None else each.bias[rows],
            )
            target.append(_Block(term, as_map(each.output)[:, rows]))
    return found


def _gru(blocks: _Blocks, h: Tensor, targets: Sequence[Tensor]) -> ConvGRUCell | None:
    for reset, z, r, n in _gru_assignments(blocks):
        for gates, sigmoid, tanh in (_SOFT, _HARD):
            reset_gate = sigmoid(_sum(r))
            if reset == "before":
                assert blocks.product is not None
                if not close(reset_gate * h, blocks.product):
                    continue
                new = tanh(_sum(n))
            else:
                new = tanh(_sum(n[:-1]) + reset_gate * n[-1].value)
            update = sigmoid(_sum(z))
            for keeps_old in (False, True):
                kept = update if keeps_old else 1 - update
                if any(close(kept * h + (1 - kept) * new, target) for target in targets):
                    terms = ([block.term for block in gate] for gate in (z, r, n))
                    return gru_cell(*terms, reset=reset, keeps_old=keeps_old, gates=gates)
    return None


def _gru_assignments(blocks: _Blocks) -> Iterator[tuple[Reset, list[_Block], list[_Block], list[_Block]]]:
    """Every way to read the blocks as update gate, reset gate and candidate."""
    joint_u = bool(blocks.u) and blocks.u[0].term.weight_x is not None
    counts = blocks.counts
    if counts in ((2, 0, 0, 1), (2, 1, 0, 1)) and (counts[1] == 0) == joint_u:
        for z, r in itertools.permutations(blocks.joint):
            yield "before", [z], [r], [*blocks.x, *blocks.u]
    elif counts == (2, 1, 1, 0):
        for z, r in itertools.permutations(blocks.joint):
            yield "after", [z], [r], [*blocks.x, *blocks.h]
    elif counts == (0, 2 if joint_u else 3, 2, 1):
        for over_x, (z, r) in itertools.product(itertools.permutations(blocks.x), itertools.permutations(blocks.h)):
            yield "before", [over_x[0], z], [over_x[1], r], [*over_x[2:], *blocks.u]
    elif counts == (0, 3, 3, 0):
        for over_x, over_h in itertools.product(itertools.permutations(blocks.x), itertools.permutations(blocks.h)):
            gates = [list(pair) for pair in zip(over_x, over_h, strict=True)]
            yield "after", gates[0], gates[1], gates[2]


def _lstm(blocks: _Blocks, c: Tensor, targets: Sequence[Tensor], peepholes: Sequence[Tensor]) -> ConvLSTMCell | None:
    weights = itertools.permutations(peepholes) if peepholes else iter([None])
    for peephole, (gates, sigmoid, tanh) in itertools.product(list(weights), (_SOFT, _HARD)):
        w_i, w_f, w_o = peephole if peephole is not None else (torch.zeros_like(c),) * 3
        for i, f, o, g in _lstm_assignments(blocks):
            c_next = sigmoid(_sum(f) + w_f * c) * c + sigmoid(_sum(i) + w_i * c) * tanh(_sum(g))
            if not any(close(c_next, target) for target in targets):
                continue
            h_next = sigmoid(_sum(o) + w_o * c_next) * tanh(c_next)
            if any(close(h_next, target) for target in targets):
                terms = ([block.term for block in gate] for gate in (i, f, o, g))
                stacked = None if peephole is None else torch.stack([weight[0] for weight in peephole])
                return lstm_cell(*terms, peephole=stacked, gates=gates)
    return None


def _lstm_assignments(blocks: _Blocks) -> Iterator[list[list[_Block]]]:
    """Every way to read the blocks as input, forget and output gate and candidate."""
    if blocks.counts == (4, 0, 0, 0):
        for order in itertools.permutations(blocks.joint):
            yield [[block] for block in order]
    elif blocks.counts == (0, 4, 4, 0):
        # Convolutions of x and h that are packed alike come first: the usual case.
        pairs = list(zip(blocks.x, blocks.h, strict=True))
        for pairing in itertools.permutations(pairs):
            yield [list(pair) for pair in pairing]
        for over_x, over_h in itertools.product(itertools.permutations(blocks.x), itertools.permutations(blocks.h)):
            yield [[a, b] for a, b in zip(over_x, over_h, strict=True)]


def _sum(gate: Sequence[_Block]) -> Tensor:
    return torch.stack([block.value for block in gate]).sum(0) if len(gate) > 1 else gate[0].value


def _peepholes(module: nn.Module, h: Tensor) -> list[Tensor]:
    """Three tensors with a value per channel, or per channel and pixel; none where there are not three."""
    shapes = {(1, h.shape[1], *size) for size in ((1, 1), tuple(h.shape[2:]))}
    own = [value for child in module.modules() for value in vars(child).values() if isinstance(value, Tensor)]
    every = [*module.parameters(), *module.buffers(), *own]
    found = [t.detach()[None] if t.dim() == 3 else t.detach() for t in every if t.dim() in (3, 4)]
    fitting = [tensor for tensor in found if tuple(tensor.shape) in shapes]
    return fitting if len(fitting) == 3 else []
