"""The part of a checkpoint that a model is loaded from: a set of weights, and a prefix of their names."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stepcell.errors import UsageError
from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint
from stepcell.exporter.from_checkpoint.families.family import NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.weight_sets import TOP, WeightSet, is_average, shape_of

__all__ = ["Miss", "Part", "ask", "fitting_parts", "lines_of", "report", "source_of"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_SHOWN = 8


@dataclass(frozen=True)
class Part(Generic[T]):
    """Tensors that fit.

    Attributes:
        key: place of their set in the file.
        prefix: start of their names there.
        tensors: by name without the prefix.
        left_out: other weights of the set.
        match: what they fit.
        averaged: whether they are a running average, by its key or prefix.
    """

    key: str
    prefix: str
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]
    match: T
    averaged: bool = False


@dataclass(frozen=True)
class Miss:
    """Tensors that do not fit.

    Attributes:
        names: what was compared.
        reason: of the family that came closest.
    """

    key: str
    prefix: str
    names: tuple[str, ...]
    reason: NotThisFamily


def fitting_parts(checkpoint: Checkpoint, matches: Callable[[Tensors], T]) -> tuple[list[Part[T]], list[Miss]]:
    """All parts that fit, outermost first, and those that came close or hold a whole set.

    What lies inside a part that fits, or nearly does, is not looked at. Sets with the same values count once.

    Args:
        matches: called with the tensors of a part, names without the prefix; raises NotThisFamily.
    """
    parts: list[Part[T]] = []
    misses: list[Miss] = []
    match_once = _Matcher(matches)
    for weights in (WeightSet(checkpoint.key, checkpoint.tensors), *checkpoint.others):
        closed: list[str] = []  # prefixes inside of which nothing is looked for
        for prefix, names in _prefixes(weights, checkpoint.prefix):
            if prefix.startswith(tuple(closed)):
                continue
            tensors = {name[len(prefix) :]: weights.tensors[name] for name in names}
            try:
                match, tensors = match_once(tensors)
            except NotThisFamily as reason:
                if reason.near:
                    closed.append(prefix)
                whole = len(names) == len(weights.tensors) or prefix == checkpoint.prefix
                if reason.near or whole:
                    misses.append(Miss(weights.key, prefix, tuple(tensors), reason))
                continue
            closed.append(prefix)
            inside = {prefix + name for name in tensors}
            scope = checkpoint.prefix or ""
            left_out = [name for name in weights.tensors if name.startswith(scope) and name not in inside]
            counted = tuple(name for name in left_out if weights.tensors[name].dim())  # a number is a counter
            averaged = is_average(weights.key) or is_average(prefix) or _averaged_by_lightning(checkpoint, weights.key)
            part = Part(weights.key, prefix, tensors, counted, match, averaged)
            if not any(_same(part, other) for other in parts):
                parts.append(part)
    return parts, misses


class _Matcher(Generic[T]):
    """Calls `matches`, once for all parts with the same names and shapes: large networks repeat their layers."""

    def __init__(self, matches: Callable[[Tensors], T]) -> None:
        self._matches = matches
        self._refused: dict[tuple[object, ...], NotThisFamily] = {}

    def __call__(self, tensors: dict[str, Tensor]) -> tuple[T, dict[str, Tensor]]:
        """What the tensors match, with or without the single numbers among them; raises NotThisFamily."""
        structure = tuple((name, tensor.dim(), shape_of(tensor)) for name, tensor in tensors.items())
        if structure in self._refused:
            raise self._refused[structure]
        try:
            return self._matches(tensors), tensors
        except NotThisFamily as reason:
            rest = {name: tensor for name, tensor in tensors.items() if "." in name or tensor.dim()}
            if 0 < len(rest) < len(tensors):
                with contextlib.suppress(NotThisFamily):
                    return self._matches(rest), rest
            self._refused[structure] = reason
            raise


def ask(checkpoint: Checkpoint, rule: str, lines: Sequence[str]) -> UsageError:
    """Error that asks which part to take.

    Args:
        rule: what is ambiguous.
        lines: options to add, each with what it takes.
    """
    shown = list(lines[:_SHOWN])
    if len(lines) > _SHOWN:
        shown.append(f"... and {len(lines) - _SHOWN} more")
    return UsageError(f"{checkpoint.path}: {rule}", hint="add one of these to the command:\n  " + "\n  ".join(shown))


def lines_of(parts: Sequence[Part[T]], families: Sequence[str | None]) -> list[str]:
    """Options that choose each part among these, with what it is."""
    several_sets = len({part.key for part in parts}) > 1
    several_families = len(set(families)) > 1
    lines = []
    for part, family in zip(parts, families, strict=True):
        options = [f"--checkpoint-key {shlex.quote(part.key)}"] if several_sets else []
        if len({other.prefix for other in parts if other.key == part.key}) > 1:
            options.append(f"--prefix {shlex.quote(part.prefix)}")
        if several_families and family:
            options.append(f"--family {family}")
        what = f"{len(part.tensors)} tensors" + (", a running average of the weights" if part.averaged else "")
        lines.append(f"{' '.join(options)}  ({what})")
    return lines


def report(checkpoint: Checkpoint, part: Part[T], what: str, misses: Sequence[Miss]) -> None:
    """Log which weights are taken where the file has more than these, and why.

    Args:
        what: the family or module that they fit.
        misses: what did not fit.
    """
    place = "" if part.key == TOP else f" of {part.key}"
    if part.prefix:
        _logger.info("weights: %d tensors%s under %s", len(part.tensors), place, part.prefix)
    elif place:
        _logger.info("weights: %d tensors%s", len(part.tensors), place)
    others = [weights for weights in (WeightSet(checkpoint.key, {}), *checkpoint.others) if weights.key != part.key]
    for weights in others:
        average = is_average(weights.key) or _averaged_by_lightning(checkpoint, weights.key)
        if not average and not part.averaged:
            continue
        reason = next((str(miss.reason) for miss in misses if miss.key == weights.key), "it has other tensors")
        kind = "a running average by its name" if average else "the weights that were not averaged"
        _logger.info("note: %s, %s, was not taken: it does not fit %s (%s)", weights.key, kind, what, reason)
    if part.left_out:
        scope = len(checkpoint.prefix or "")
        tops = dict.fromkeys(_top(name, part.prefix, scope) for name in part.left_out)
        shown = ", ".join(list(tops)[:_SHOWN]) + (" ..." if len(tops) > _SHOWN else "")
        _logger.warning(
            "warning: %d of %d tensors are not part of %s and are left out: %s",
            len(part.left_out),
            len(part.left_out) + len(part.tensors),
            what,
            shown,
        )


def source_of(part: Part[T]) -> dict[str, object]:
    """Entries for the contract's `source` that find this part again; {} if the file holds nothing else."""
    found: dict[str, object] = {} if part.key == TOP else {"checkpoint_key": part.key}
    return {**found, "checkpoint_prefix": part.prefix} if part.prefix else found


def _prefixes(weights: WeightSet, given: str | None) -> Iterator[tuple[str, list[str]]]:
    """Each prefix that ends with a dot, with the names that start with it; the shortest first."""
    groups: dict[str, list[str]] = {"": []}
    for name in weights.tensors:
        words = name.split(".")
        for count in range(len(words)):
            groups.setdefault("".join(f"{word}." for word in words[:count]), []).append(name)
    for prefix in sorted(groups, key=lambda prefix: prefix.count(".")):
        if prefix.startswith(given or ""):
            yield prefix, groups[prefix]


def _averaged_by_lightning(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a set was averaged by Lightning's WeightAveraging: it keeps the raw weights under another key."""
    keys = {checkpoint.key, *(weights.key for weights in checkpoint.others)}
    return key == "state_dict" and "current_model_state" in keys


def _same(part: Part[T], other: Part[T]) -> bool:
    """Whether two parts hold the same values."""
    if part.tensors.keys() != other.tensors.keys():
        return False
    return all(_equal(tensor, other.tensors[name]) for name, tensor in part.tensors.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    dense = all(t.layout is torch.strided and not (t.is_meta or t.is_nested or t.is_quantized) for t in (a, b))
    return dense and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def _top(name: str, prefix: str, scope: int) -> str:
    """The outermost module of `name` that is not on the way to `prefix`."""
    words = name.split(".")
    for count in range(1, len(words)):
        top = ".".join(words[:count])
        if len(top) >= scope and not prefix.startswith(f"{top}."):
            return top
    return name
