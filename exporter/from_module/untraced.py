"""What a module remembers where no tracer sees it: numbers, NumPy arrays, variables outside the module."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepcell.exporter.from_module.attributes import StateAttribute, same
from stepcell.exporter.from_module.trees import flatten, map_leaves

__all__ = ["advice_on_numbers", "memory_outside", "numbers_in"]

_BEFORE_AND_AFTER = "docs/own-module.md has it before and after"


def numbers_in(attributes: Iterable[StateAttribute], module: nn.Module) -> dict[str, str]:
    """By attribute what it holds in place of a tensor: "a Python number" or "a NumPy array"."""
    found = {}
    for attribute in attributes:
        leaves = flatten(attribute.get(module))[0] if attribute.exists(module) else []
        if any(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves):
            found[str(attribute)] = "a NumPy array"
        elif any(isinstance(leaf, (bool, int, float)) for leaf in leaves):
            found[str(attribute)] = "a Python number"
    return found


def advice_on_numbers(found: Mapping[str, str]) -> str:
    """What becomes of them in a file, and what to write instead."""
    kinds = sorted(set(found.values()), reverse=True)
    own = "self." + next(iter(found)).rpartition(".")[2]
    return (
        f"{', '.join(found)}: {' or '.join(kinds)} that changes from call to call is fixed in the file; keep it as a "
        f"tensor with a row for each stream, such as {own} = torch.zeros(x.shape[0], 1), compute it with torch, and "
        f"choose with torch.where({own} == 0, new, old) instead of `if`; {_BEFORE_AND_AFTER}"
    )


def memory_outside(module: nn.Module, call: Callable[[nn.Module], Any]) -> str | None:
    """Whether fresh copies of a module influence each other, and through what; None if they do not.

    Args:
        call: calls a copy with the same inputs each time.
    """
    results, before = [], _outside(module)
    for _ in range(2):
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(0)
        np.random.seed(0)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                results.append(map_leaves(_detached, call(copy.deepcopy(module))))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
    if same(*results):
        return None
    after = _outside(module)
    return next((name for name in after if name not in before or not same(before[name], after[name])), "a variable")


def _outside(module: nn.Module) -> dict[str, Any]:
    """Copies of what the code of a module can reach outside it: globals, variables around it, attributes of classes."""
    found: dict[str, Any] = {}
    for child in module.modules():
        for owner in type(child).__mro__:
            if owner.__module__.partition(".")[0] == "torch":
                break
            for name, value in vars(owner).items():
                if not name.startswith("__") and not callable(value):
                    found[f"{owner.__name__}.{name}, an attribute of the class"] = value
                found.update(_around(value))
    return {name: map_leaves(_detached, value) for name, value in found.items() if _holds_values(value)}


def _around(function: Any) -> Iterator[tuple[str, Any]]:
    """The variables outside a function that its code names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name in code.co_names:
        if name in function.__globals__:
            yield f"{name}, a global variable", function.__globals__[name]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"{name}, a variable around the class", cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _holds_values(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, Tensor, np.ndarray, int, float)) or value is None


def _detached(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
