"""Conversion of nested tuples, lists and dicts to a flat list of leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TreeShape", "flatten", "map_leaves"]


@dataclass(frozen=True)
class TreeShape:
    """The structure of a container; a leaf has no kind. Named tuples and subclasses of dict keep their class.

    torch's own pytree module is private, and its specs warn when they are copied.
    """

    kind: type | None = None
    keys: tuple[Any, ...] | None = None
    children: tuple[TreeShape, ...] = ()

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The container again, with these leaves."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(leaves)
        values = [child._build(leaves) for child in self.children]
        if self.keys is not None:
            return self.kind(zip(self.keys, values, strict=True))
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)


def flatten(value: Any) -> tuple[list[Any], TreeShape]:
    """Leaves in order, and the structure; everything but tuples, lists and dicts is a leaf, including None."""
    if isinstance(value, dict):
        keys, values = tuple(value), list(value.values())
    elif isinstance(value, (tuple, list)):
        keys, values = None, list(value)
    else:
        return [value], TreeShape()
    parts = [flatten(each) for each in values]
    return [leaf for leaves, _ in parts for leaf in leaves], TreeShape(
        type(value), keys, tuple(spec for _, spec in parts)
    )


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same container with `function` applied to every leaf."""
    leaves, spec = flatten(value)
    return spec.unflatten([function(leaf) for leaf in leaves])
