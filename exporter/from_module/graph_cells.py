"""Cells of a lifted module, recognised in its traced graph; names of its states."""

from __future__ import annotations

import ast
import itertools
import logging
from collections.abc import Callable, Sequence

import msgspec
import onnx
from onnxscript import ir

from stepcell.contract import StepContract
from stepcell.exporter.cell_recognition.cell import RecognisedCell
from stepcell.exporter.cell_recognition.find import find_cells
from stepcell.exporter.cell_recognition.normalise import normalise
from stepcell.exporter.cell_recognition.replace import replace_cells
from stepcell.exporter.cell_recognition.state_pairs import RESHAPING, CellState, states_of_cells
from stepcell.exporter.from_module.names import Owner

__all__ = ["replace_cells_of_module"]

_logger = logging.getLogger(__name__)
_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "module"  # the attribute of LiftedModel that holds the user's module


def replace_cells_of_module(
    model: onnx.ModelProto,
    contract: StepContract,
    names_of_states: Callable[[Sequence[Owner | None]], list[str]],
) -> tuple[onnx.ModelProto, StepContract]:
    """Replace the cells of a traced graph by ops, and rename the states that cells own.

    Args:
        model: the graph as traced, its states named as in `contract`.
        names_of_states: final names, given the owner of every state.

    Returns:
        The graph and its contract, with the cells that were replaced and those left alone.
    """
    for node in model.graph.node:
        for entry in node.metadata_props:
            if entry.key == _SCOPES:
                entry.value = _without_root(entry.value)
    graph = ir.from_proto(model)
    normalise(graph)
    cells, misses = find_cells(graph)
    found_states = states_of_cells(graph, cells, RESHAPING)
    owners = _owners(found_states, cells, contract)
    if cells:
        replace_cells(graph, cells)
        model = ir.to_proto(graph)
    own = [msgspec.structs.replace(cell, name=cell.name.removeprefix(f"{_ROOT}.")) for cell in contract.cells]
    found = [*own, *(cell.spec for cell in cells), *(miss.spec for miss in misses)]
    names = names_of_states(owners)
    _note_exchanged(found_states, contract, names)
    states = [msgspec.structs.replace(state, name=name) for state, name in zip(contract.states, names, strict=True)]
    renamed = {
        **{old.input: new.input for old, new in zip(contract.states, states, strict=True)},
        **{old.output: new.output for old, new in zip(contract.states, states, strict=True)},
    }
    _rename(model.graph, renamed)
    contract = msgspec.structs.replace(contract, states=tuple(states), cells=tuple(found))
    contract.check("step model")
    narrow = [state.name for state in states if state.output in _rounded(model.graph)]
    if contract.precision == "float16" and narrow:
        _logger.info(
            "note: %s: computed by the module's own code, in float16; try --precision float32 if it is too narrow",
            ", ".join(narrow),
        )
    return model, contract


def _without_root(scopes: str) -> str:
    """Paths relative to the user's module: ['', 'module', 'module.cell', 'conv2d'] to ['', 'cell', 'conv2d']."""
    try:
        path = [str(scope) for scope in ast.literal_eval(scopes)]
    except (ValueError, SyntaxError):
        return scopes
    return repr([scope.removeprefix(f"{_ROOT}.") for scope in path if scope != _ROOT])


def _note_exchanged(found: Sequence[CellState], contract: StepContract, names: Sequence[str]) -> None:
    """Say where a cell starts from one state and leaves the next value of another, as where --state exchanges them."""
    after = {state.output: name for state, name in zip(contract.states, names, strict=True)}
    for state, name in zip(contract.states, names, strict=True):
        left = {each.output: each.cell for each in found if each.input == state.input}
        other = next((output for output in left if output in after), None)
        if other is not None and state.output not in left:
            _logger.info(
                f"note: {name}: cell {left[other]} starts from it and leaves the next value of {after[other]}; if that "
                "is not meant, exchange their positions in --state"
            )


def _owners(found: Sequence[CellState], cells: Sequence[RecognisedCell], contract: StepContract) -> list[Owner | None]:
    """By state, the cells that it enters and leaves without passing through other code."""
    paths = {cell.name: cell.path for cell in cells}
    owners: list[Owner | None] = []
    for state in contract.states:
        own = [(each.cell, each.role) for each in found if (each.input, each.output) == (state.input, state.output)]
        roles = {role for _, role in own}
        if len(roles) != 1:
            owners.append(None)
            continue
        names = tuple(name for name, _ in own)
        levels = zip(*(paths[name].split(".") for name in names), strict=False)
        path = ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
        owners.append(Owner(names, path, roles.pop()))
    return owners


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename inputs and outputs of a graph wherever they are read; names may be exchanged."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]


def _rounded(graph: onnx.GraphProto) -> set[str]:
    """Outputs that are converted from another precision: computed in float16 by the module's own code."""
    return {node.output[0] for node in graph.node if node.op_type == "Cast"} & {value.name for value in graph.output}
