"""Attributes in which a module keeps values between calls, and containers of states."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepcell.exporter.from_module.trees import flatten, map_leaves

__all__ = [
    "Inputs",
    "Starts",
    "StateAttribute",
    "attributes_kept",
    "cast_attributes",
    "demote_buffers",
    "detached_copy",
    "is_state",
    "random",
    "same",
    "snapshot",
    "state_leaves",
]

Inputs = Mapping[str, Tensor]  # data inputs by name
Starts = Mapping[str, Tensor | None]  # values of required state arguments in the first call

_INTERNALS = set(vars(nn.Module()))


@dataclass(frozen=True, order=True)
class StateAttribute:
    """The attribute `name` of the submodule at `path` ("": the module itself), which holds a state."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    def exists(self, module: nn.Module) -> bool:
        """Whether `module` has such an attribute."""
        try:
            return hasattr(module.get_submodule(self.path), self.name)
        except AttributeError:
            return False

    def get(self, module: nn.Module) -> Any:
        """The value in `module`."""
        return getattr(module.get_submodule(self.path), self.name)

    def set(self, module: nn.Module, value: Any) -> None:
        """Set the value in `module`."""
        setattr(module.get_submodule(self.path), self.name, value)


def snapshot(module: nn.Module) -> dict[StateAttribute, Any]:
    """Copies of every buffer and every other attribute of a module and its submodules.

    Parameters are left out, since a forward pass does not change them.
    """
    found = {}
    for path, child in module.named_modules():
        plain = {name: value for name, value in vars(child).items() if name not in _INTERNALS}
        for name, value in itertools.chain(plain.items(), child._buffers.items()):
            leaves, spec = flatten(value)
            copies = [
                leaf.detach().clone()
                if isinstance(leaf, Tensor)
                else leaf.copy()
                if isinstance(leaf, np.ndarray)
                else leaf
                for leaf in leaves
            ]
            found[StateAttribute(path, name)] = spec.unflatten(copies)
    return found


def is_state(leaf: object) -> bool:
    """Whether a leaf of a container can be a hidden state: a tensor of any real dtype, also one without axes."""
    return isinstance(leaf, Tensor) and not leaf.is_complex()


def cast_attributes(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Apply a conversion to the tensors in plain attributes, which `nn.Module.to` leaves as they are."""
    for child in module.modules():
        for name, value in list(vars(child).items()):
            if name in _INTERNALS:
                continue
            leaves, spec = flatten(value)
            if any(isinstance(leaf, Tensor) for leaf in leaves):
                new = [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                child.__dict__[name] = spec.unflatten(new)


def detached_copy(module: nn.Module) -> nn.Module:
    """A deep copy, also of a module that keeps tensors with a gradient graph from earlier calls."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        plain = [value for name, value in vars(child).items() if name not in _INTERNALS]
        for leaf in (leaf for value in (*plain, *child._buffers.values()) for leaf in flatten(value)[0]):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def attributes_kept(module: nn.Module, attributes: Iterable[StateAttribute]) -> Iterator[None]:
    """Restore attributes after a call, as the tracer requires; those that did not exist are removed again."""
    saved = []
    for attribute in attributes:
        if attribute.exists(module):
            value = attribute.get(module)
            saved.append((attribute, True, value))
            attribute.set(module, map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value))
        else:
            saved.append((attribute, False, None))
    try:
        yield
    finally:
        for attribute, existed, value in saved:
            if existed:
                attribute.set(module, value)
            elif attribute.exists(module):
                delattr(module.get_submodule(attribute.path), attribute.name)


def state_leaves(value: Any) -> list[Tensor]:
    """The hidden states in a container, in order."""
    return [leaf for leaf in flatten(value)[0] if is_state(leaf)]


def random(shape: Sequence[int], seed: int) -> Tensor:
    """Uniform numbers in -1 to 1, float64, reproducible by their seed."""
    return 2 * torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def same(one: Any, other: Any) -> bool:
    """Whether two containers are equal in structure and in every value."""
    (a, spec_a), (b, spec_b) = flatten(one), flatten(other)
    return spec_a == spec_b and all(_same_leaf(x, y) for x, y in zip(a, b, strict=True))


def demote_buffers(module: nn.Module, attributes: Iterable[StateAttribute]) -> None:
    """Turn buffers into plain attributes, so that a step can assign traced tensors to them."""
    for attribute in attributes:
        owner = module.get_submodule(attribute.path)
        if attribute.name in owner._buffers:
            value = owner._buffers.pop(attribute.name)
            owner._non_persistent_buffers_set.discard(attribute.name)
            owner.__dict__[attribute.name] = value


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (np.ndarray, np.generic)) and isinstance(other, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and bool(np.array_equal(one, other))
    if isinstance(one, (bool, int, float, str, type(None))):
        return type(one) is type(other) and one == other
    return type(one) is type(other)  # objects of other classes are not compared
