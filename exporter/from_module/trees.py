"""Conversion of nested containers to a flat list of leaves and back."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["TreeShape", "flatten", "map_leaves"]

_NO_CONTAINERS = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType)
_DEEPEST = 4  # of objects inside objects: a state is not deeper, and objects may refer to each other


@dataclass(frozen=True)
class TreeShape:
    """The structure of a container; a leaf has no kind. Named tuples and subclasses of dict keep their class.

    torch's own pytree module is private, and its specs warn when they are copied.

    Attributes:
        keys: of a dict its keys, of an object the names of its attributes.
        is_object: built without a call of its class.
        longest: `maxlen` of a deque.
    """

    kind: Any = None
    keys: tuple[Any, ...] | None = None
    children: tuple[TreeShape, ...] = ()
    is_object: bool = False
    longest: int | None = None

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The container again, with these leaves."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(leaves)
        values = [child._build(leaves) for child in self.children]
        if self.is_object:
            new: Any = object.__new__(self.kind)
            for name, value in zip(self.keys or (), values, strict=True):
                object.__setattr__(new, name, value)
            return new
        if self.keys is not None:
            return self.kind(zip(self.keys, values, strict=True))
        if issubclass(self.kind, deque):
            return self.kind(values, maxlen=self.longest)
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)


def flatten(value: Any, _depth: int = 0) -> tuple[list[Any], TreeShape]:
    """Leaves in order, and the structure.

    Containers are tuples, lists, deques, dicts, dataclasses, and objects that hold tensors; everything else is a leaf,
    including None.
    """
    keys: tuple[Any, ...] | None = None
    is_object = False
    if isinstance(value, dict):
        keys, values = tuple(value), list(value.values())
    elif isinstance(value, (tuple, list, deque)):
        values = list(value)
    elif (attributes := _attributes(value, _depth)) is not None:
        keys, values, is_object = tuple(attributes), list(attributes.values()), True
    else:
        return [value], TreeShape()
    parts = [flatten(each, _depth + is_object) for each in values]
    return [leaf for leaves, _ in parts for leaf in leaves], TreeShape(
        type(value),
        keys,
        tuple(spec for _, spec in parts),
        is_object,
        value.maxlen if isinstance(value, deque) else None,
    )


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same container with `function` applied to every leaf."""
    leaves, spec = flatten(value)
    return spec.unflatten([function(leaf) for leaf in leaves])


def _attributes(value: Any, depth: int) -> dict[str, Any] | None:
    """The attributes of a dataclass or of an object that holds tensors; None for anything else."""
    if depth >= _DEEPEST or isinstance(value, _NO_CONTAINERS):
        return None
    if dataclasses.is_dataclass(value):
        own = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)
        }
        return {**own, **getattr(value, "__dict__", {})}
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or type(value).__module__.partition(".")[0] in ("torch", "numpy", "builtins"):
        return None
    holds = any(isinstance(leaf, Tensor) for each in attributes.values() for leaf in flatten(each, depth + 1)[0])
    return dict(attributes) if holds else None
