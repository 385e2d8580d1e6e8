"""States that live in variables of `forward`: passed from one call of a submodule to the next, in a loop over frames.

They are found by calling the module with three frames, and reached by hooks on the submodule.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.exporter.from_module.trees import TreeShape, flatten

__all__ = ["LocalState", "find_local_states"]


@dataclass(frozen=True)
class LocalState:
    """An argument of the submodule at `path` that takes a part of what its previous call returned.

    Attributes:
        argument: position or keyword.
        leaves: by tensor of the argument, its place among the tensors that the submodule returns.
        tree: structure of the argument.
    """

    path: str
    argument: int | str
    leaves: tuple[int, ...]
    tree: TreeShape = field(compare=False)

    def __str__(self) -> str:
        return self.path

    @contextlib.contextmanager
    def exchanged(self, module: nn.Module, value: Any) -> Iterator[list[Any]]:
        """While `module` is called once: set the argument, if `value` is not None, and append what it is to be next."""
        found: list[Any] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if value is None or found:
                return None
            if isinstance(self.argument, int):
                return (*args[: self.argument], value, *args[self.argument + 1 :]), kwargs
            return args, {**kwargs, self.argument: value}

        def leave(_: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            leaves = flatten(result)[0]
            found[:] = [self.tree.unflatten([leaves[index] for index in self.leaves])]

        child = module.get_submodule(self.path)
        handles = [
            child.register_forward_pre_hook(enter, with_kwargs=True),
            child.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Seen:
    """A call of a submodule: its arguments by position and keyword, and its result."""

    arguments: dict[int | str, Any]
    result: Any


def find_local_states(module: nn.Module, clip: Mapping[str, Tensor], frames: int) -> tuple[LocalState, ...]:
    """The states that a call with a clip passes from frame to frame.

    Args:
        module: a copy, which is called.
        clip: inputs of `frames` frames, three or more.
    """
    calls: dict[str, list[_Seen]] = {}
    handles = [
        child.register_forward_hook(_noted(calls.setdefault(path, [])), with_kwargs=True)
        for path, child in module.named_modules()
        if path and not isinstance(child, torch.jit.ScriptModule)  # which takes no hooks
    ]
    try:
        module(**clip)
    finally:
        for handle in handles:
            handle.remove()
    found: list[LocalState] = []
    for path, seen in calls.items():
        if any(path.startswith(f"{other.path}.") for other in found):
            continue  # the state of a part is a state of the whole
        child = module.get_submodule(path)
        if isinstance(child, nn.RNNBase):
            found += _of_layer(path, child, seen, frames)
        elif len(seen) == frames:
            found += _fed_back(path, seen)
    return tuple(found)


def _noted(seen: list[_Seen]) -> Callable[..., None]:
    def note(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        named: dict[int | str, Any] = dict(enumerate(args))
        named.update(kwargs)
        seen.append(_Seen(named, result))

    return note


def _fed_back(path: str, seen: Sequence[_Seen]) -> Iterator[LocalState]:
    """Arguments of which every tensor was returned by the previous call, at every call but the first."""
    for name, value in seen[-1].arguments.items():
        leaves, tree = flatten(value)
        links: set[tuple[int | None, ...]] = set()
        for before, after in itertools.pairwise(seen):
            returned = flatten(before.result)[0]
            links.add(tuple(_place(leaf, returned) for leaf in flatten(after.arguments.get(name))[0]))
        if len(links) == 1 and leaves:
            (link,) = links
            known = tuple(index for index in link if index is not None)
            if len(known) == len(link) == len(leaves):
                yield LocalState(path, name, known, tree)


def _of_layer(path: str, layer: nn.RNNBase, seen: Sequence[_Seen], frames: int) -> Iterator[LocalState]:
    """The state inside a recurrent layer of torch that is called with all frames at once."""
    if len(seen) != 1 or layer.bidirectional:
        if len(seen) == frames:
            yield from _fed_back(path, seen)
        return
    (call,) = seen
    x = call.arguments.get(0, call.arguments.get("input"))
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1 if layer.batch_first else 0] == frames:
        leaves, tree = flatten(call.result[1])
        yield LocalState(path, 1 if 1 in call.arguments else "hx", tuple(range(1, 1 + len(leaves))), tree)


def _place(leaf: Any, returned: Sequence[Any]) -> int | None:
    """Which tensor of a result this is, also where it was detached."""
    if not isinstance(leaf, Tensor):
        return None
    for index, other in enumerate(returned):
        if isinstance(other, Tensor) and other.shape == leaf.shape and other.data_ptr() == leaf.data_ptr():
            return index
    return None
