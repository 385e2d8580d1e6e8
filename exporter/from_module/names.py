"""Names of lifted states and of outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepcell.contract import state_names
from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import StateAttribute
from stepcell.exporter.from_module.find_states import Argument
from stepcell.exporter.from_module.local_states import LocalState
from stepcell.exporter.from_module.trees import flatten

__all__ = ["Owner", "StateTensor", "names_of_outputs", "names_of_states"]

Place = Argument | StateAttribute | LocalState


@dataclass(frozen=True)
class StateTensor:
    """One lifted tensor: which place of the interface it belongs to, and which leaf of the value there.

    A tensor without axes (`is_scalar`) is a state of one element.
    """

    place: int
    leaf: int
    is_scalar: bool = False


@dataclass(frozen=True)
class Owner:
    """The cells that alone read and write a state.

    Attributes:
        cells: their names; several for the layers that share one tensor.
        path: path of the module that holds them; "" for the model itself.
        role: "h" or "c".
    """

    cells: tuple[str, ...]
    path: str
    role: str


def names_of_states(
    places: Sequence[Place], tensors: Sequence[StateTensor], owners: Sequence[Owner | None]
) -> list[str]:
    """A name for every lifted tensor.

    A state of a cell has the path of its module (`memory.h`) where the module keeps it, and `h`, `c`,
    `h0`, `c0`, ... where it is an argument; any other state is named after its attribute or argument.
    """
    names: list[str] = []
    for position, place in enumerate(places):
        own = [(tensor, owner) for tensor, owner in zip(tensors, owners, strict=True) if tensor.place == position]
        plain = [_plain(place) if len(own) == 1 else f"{place}{_leaf(place, tensor)}" for tensor, _ in own]
        known = [owner for _, owner in own if owner is not None]
        if isinstance(place, (StateAttribute, LocalState)):
            by_cell = [_path(owner) if owner else name for (_, owner), name in zip(own, plain, strict=True)]
            names += by_cell if len(set(by_cell)) == len(by_cell) else plain
        elif len(known) == len(own) and not (_count(places, Argument) > 1 and len(own) == 1):
            roles: dict[tuple[str, ...], list[str]] = {}
            for owner in known:
                roles.setdefault(owner.cells, []).append(owner.role)
            numbered = iter(state_names(list(roles.values())))
            by_role = {(cells, role): next(numbered) for cells, each in roles.items() for role in each}
            names += [by_role[owner.cells, owner.role] for owner in known]
        else:
            names += plain
    if len(set(names)) < len(names) and any(owners):
        return names_of_states(places, tensors, [None] * len(tensors))
    return names


def names_of_outputs(outputs: Any) -> list[str]:
    """The keys of dicts where every tensor has a key of its own; else `y`, or `y0`, `y1`, ...

    Raises:
        ExportError: an output is no tensor.
    """
    leaves = flatten(outputs)[0]
    others = [type(leaf).__name__ for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]
    if others:
        raise ExportError(f"forward returns a {others[0]}; a step returns tensors", hint="in tuples, lists and dicts")
    keys = [key for key, leaf in zip(_keys(outputs), leaves, strict=True) if leaf is not None]
    if all(keys) and len(set(keys)) == len(keys):
        return keys
    return ["y"] if len(keys) == 1 else [f"y{index}" for index in range(len(keys))]


def _leaf(place: Place, tensor: StateTensor) -> str:
    return f".{tensor.leaf}" if isinstance(place, (StateAttribute, LocalState)) else str(tensor.leaf)


def _plain(place: Place) -> str:
    return f"{place}.h" if isinstance(place, LocalState) else str(place)


def _path(owner: Owner) -> str:
    return f"{owner.path}.{owner.role}" if owner.path else owner.role


def _count(places: Sequence[object], kind: type) -> int:
    return sum(isinstance(place, kind) for place in places)


def _keys(value: Any, key: str = "") -> list[str]:
    """Of every leaf the innermost dict key above it."""
    if isinstance(value, Mapping):
        return [name for own, child in value.items() for name in _keys(child, str(own))]
    if isinstance(value, (tuple, list)):
        return [name for child in value for name in _keys(child, key)]
    return [key]
