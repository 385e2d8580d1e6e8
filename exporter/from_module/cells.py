"""Put canonical cells in the place of a module's own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.contract import CellSpec
from stepcell.errors import ExportError
from stepcell.exporter.from_module.calls import Call
from stepcell.exporter.from_module.cell import AdoptedCell
from stepcell.exporter.from_module.identify import close, propose
from stepcell.exporter.from_module.recorder import Recorder
from stepcell.exporter.from_module.registry import Cell, adapter_for
from stepcell.exporter.from_module.rnn import AdoptedRNN, adopt_rnn
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell
from stepcell.models.stack import GRUCell, LSTMCell

__all__ = ["Found", "Replaced", "replace_cells"]

_STEPS = 6  # of the comparison of one cell, state fed back
_RECURRENT = re.compile("GRU|LSTM|RNN|Recurrent", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """One recurrent cell: what it became, or why it was left."""

    path: str
    kind: str
    spec: CellSpec


Replaced = AdoptedCell | AdoptedRNN


def replace_cells(module: nn.Module, calls: Mapping[str, Call]) -> tuple[nn.Module, list[Found]]:
    """Replace the cells inside `module`, innermost first; those that fit nothing stay.

    Args:
        module: in float64; changed.
        calls: how each submodule is called in a step.

    Returns:
        The module (another one where it is a cell itself) and every cell that was seen.

    Raises:
        ExportError: a cell differs from what its registered adapter says.
    """
    found: list[Found] = []
    done: list[str] = []
    paths = sorted(calls, key=lambda path: -len(path.split(".")) if path else 1)
    for path in paths:
        child = module.get_submodule(path)
        if isinstance(child, (ConvGRUCell, ConvLSTMCell)):
            done.append(path)
        if any(_within(other, path) or _within(path, other) for other in done):
            continue
        replacement = _replacement(path, child, calls[path])
        if isinstance(replacement, str):
            spec = _left(child, calls[path], replacement)
            if spec is not None:
                done.append(path)
                found.append(Found(path, type(child).__name__, spec))
            continue
        done.append(path)
        found.append(Found(path, type(child).__name__, replacement[1]))
        if path:
            for alias in [name for name, each in module.named_modules(remove_duplicate=False) if each is child]:
                module.set_submodule(alias, replacement[0])
        else:
            module = replacement[0]
    return module, sorted(found, key=lambda each: each.path)


def _replacement(path: str, child: nn.Module, call: Call) -> tuple[Replaced, CellSpec] | str:
    if isinstance(child, (nn.GRU, nn.LSTM)):
        rnn = adopt_rnn(child, call)
        return rnn if isinstance(rnn, str) else (rnn, rnn.first_layer(path))
    adapter = adapter_for(child)
    if adapter is not None:
        cell = adapter(child).double()
    elif isinstance(child, nn.GRUCell):
        cell = GRUCell.from_torch(child).double()
    elif isinstance(child, nn.LSTMCell):
        cell = LSTMCell.from_torch(child).double()
    else:
        proposal = propose(child, call)
        if isinstance(proposal, str):
            return proposal
        adopted = _checked(child, call, *proposal)
        return adopted if isinstance(adopted, str) else (adopted, adopted.canonical.cell_spec(path))
    if len(call.tensors) != len(cell.states) + 1:
        reason = f"takes {len(call.tensors)} tensors, a {cell.op.name} takes x and {' and '.join(cell.states)}"
    else:
        for order in itertools.permutations(call.tensors):
            adopted = _checked(child, call, cell, order)
            if not isinstance(adopted, str):
                return adopted, adopted.canonical.cell_spec(path)
        reason = "computes something else than its adapter says"
    if adapter is not None:
        raise ExportError(
            f"{path or type(child).__name__}: {type(child).__name__} {reason}",
            hint="look at gates, concat, update and reset of register_cell",
        )
    return reason


def _checked(child: nn.Module, call: Call, cell: Cell, order: tuple[int, ...]) -> AdoptedCell | str:
    """`cell` in place of `child`, where both agree in float64 over several steps with the state fed back."""
    names = ("x", *cell.states)
    roles = dict(zip(names, order, strict=True))
    peephole = getattr(cell, "peephole", None)
    small = peephole is None or tuple(peephole.shape[2:]) == (1, 1)  # else made for one size of map
    leaves, results = call.random(1, small=small), []
    for step in range(_STEPS):
        leaves[roles["x"]] = call.random(step + 2, small=small)[roles["x"]]
        try:
            with torch.no_grad():
                _, *states = cell(*(call.frame(leaves[roles[name]]) for name in names))
            theirs = call.evaluate(child, [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        except (RuntimeError, ValueError, IndexError) as error:
            return f"does not run by itself: {error}"
        new = dict(zip(cell.states, states, strict=True))
        results.append(tuple(_role(leaf, new, call) for leaf in theirs))
        if "" in results[-1] or results[-1] != results[0]:
            return "returns something else than its new state, or computes it in another way"
        leaves = [*leaves]
        for name, state in new.items():
            leaves[roles[name]] = state.flatten(1) if leaves[roles["x"]].dim() == 2 else state
    return AdoptedCell(child, cell, call, roles, results[0])


def _role(leaf: Any, states: Mapping[str, Tensor], call: Call) -> str | None:
    """Which new state a result is; None for no value, "" for another one."""
    if leaf is None:
        return None
    if not isinstance(leaf, Tensor):
        return ""
    return next((name for name, state in states.items() if close(call.frame(leaf), state)), "")


def _left(child: nn.Module, call: Call, reason: str) -> CellSpec | None:
    """How the contract lists a cell that stays made of ordinary nodes; None for what is no cell."""
    shapes = [tuple(call.leaves[position].shape) for position in call.tensors]
    states = [leaf for leaf in call.results if isinstance(leaf, Tensor) and tuple(leaf.shape) in shapes]
    if not states or not (call.attributes or _RECURRENT.search(type(child).__name__)):
        return None
    try:
        with Recorder() as recorder:
            call.evaluate(child, call.random(0, small=False))
        kernels = [tuple(each.weight.shape[2:]) for each in recorder.maps]
    except Exception:  # only the kernel is missing then
        kernels = []
    height, width = max(kernels, default=(1, 1))
    return CellSpec(
        name="", op=None, hidden=states[0].shape[min(1, states[0].dim() - 1)], kernel=(height, width), reason=reason
    )


def _within(path: str, outer: str) -> bool:
    return path == outer or not outer or path.startswith(outer + ".")
