"""Weights inside a training checkpoint: every dict of tensors, wherever it lies, and averages stored as lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stepcell.exporter.from_checkpoint.printable import printable

__all__ = ["TOP", "WeightSet", "is_average", "shape_of", "weight_sets"]

TOP = "."  # value of --checkpoint-key for the file's top level
_MAX_DEPTH = 12
_NO_WEIGHTS = re.compile(r"(.*_)?optim.*|(.*_)?(lr_)?sched(uler)?s?|(grad_)?scaler|rng_.*|loops", re.IGNORECASE)
_AVERAGE = re.compile(r"(^|[._])(ema|swa|shadow|averag|avg)|(ema|swa|averaged?|avg)([._]|$)", re.IGNORECASE)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class WeightSet:
    """One dict of tensors in a checkpoint.

    Attributes:
        key: its place in the file, such as `state_dict` or `ema.module`; "." for the top level.
        tensors: by name, as in the file.
        no_tensors: entries with the name of a parameter that are something else, with their type.
    """

    key: str
    tensors: dict[str, Tensor]
    no_tensors: dict[str, str] = field(default_factory=dict)


def is_average(name: str) -> bool:
    """Whether a key or prefix is one that training code gives to a running average of the weights."""
    return _AVERAGE.search(name) is not None


def weight_sets(content: object) -> list[WeightSet]:
    """All sets of weights in a checkpoint's content, the one with the most tensors first.

    States of optimisers are left out. A list of tensors that fit the parameters of a set one by one, as some averages
    are stored (`shadow_params`), is a set with the names and the buffers of that one; in any other list the names are
    numbers.
    """
    sets: list[WeightSet] = []
    lists: list[tuple[str, Sequence[Tensor]]] = []
    for path, found in _collections(content, (), set()):
        key = ".".join(path) or TOP
        if not isinstance(found, Mapping):
            lists.append((key, found))
        elif tensors := {_text(name): value for name, value in found.items() if isinstance(value, Tensor)}:
            sets.append(WeightSet(key, tensors, _no_tensors(found)))
    sets.sort(key=lambda weights: -len(weights.tensors))
    return sets + [_named(key, tensors, sets) for key, tensors in lists]


def _collections(
    value: object, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[object, object] | Sequence[Tensor]]]:
    """Every dict, and every list of tensors alone, once each."""
    if not isinstance(value, (Mapping, list, tuple)) or id(value) in seen or len(path) > _MAX_DEPTH:
        return
    seen.add(id(value))  # a file may hold itself
    if isinstance(value, Mapping):
        yield path, value
        items = [(_text(name), item) for name, item in value.items()]
    else:
        if value and all(isinstance(item, Tensor) for item in value):
            yield path, value
        items = [(str(index), item) for index, item in enumerate(value)]
    for name, item in items:
        if not _NO_WEIGHTS.fullmatch(name):
            yield from _collections(item, (*path, name), seen)


def _no_tensors(found: Mapping[object, object]) -> dict[str, str]:
    return {
        _text(name): type(value).__name__
        for name, value in found.items()
        if str(name).rpartition(".")[2] in ("weight", "bias") and not isinstance(value, (Tensor, Mapping))
    }


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; () for a nested tensor, which has none."""
    return () if tensor.is_nested else tuple(tensor.shape)


def _text(name: object) -> str:
    return printable(str(name))


def _named(key: str, tensors: Sequence[Tensor], sets: Sequence[WeightSet]) -> WeightSet:
    shapes = list(map(shape_of, tensors))
    for weights in sets:
        names = [name for name in weights.tensors if not name.endswith(_BUFFERS)]
        if [shape_of(weights.tensors[name]) for name in names] == shapes:
            return WeightSet(key, {**weights.tensors, **dict(zip(names, tensors, strict=True))})
    return WeightSet(key, {str(index): tensor for index, tensor in enumerate(tensors)})
