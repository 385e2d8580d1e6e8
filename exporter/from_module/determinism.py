"""Check that a module is deterministic in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.errors import ExportError
from stepcell.exporter.floats import is_float
from stepcell.exporter.from_module.attributes import Inputs, Starts, same
from stepcell.exporter.from_module.trees import flatten, map_leaves
from stepcell.exporter.from_module.untraced import memory_outside

__all__ = ["check_deterministic"]


def check_deterministic(module: nn.Module, inputs: Inputs, starts: Starts) -> None:
    """Two copies must agree under different random seeds.

    Raises:
        ExportError: they do not, with what they share outside the module, or the innermost module that is random; or
            `forward` fails or returns NaN.
    """
    runs = []
    for seed in (0, 1):
        own = copy.deepcopy(module)
        calls: list[tuple[str, Any, Any]] = []
        for path, child in own.named_modules():
            if not isinstance(child, torch.jit.ScriptModule):  # it takes no hooks
                child.register_forward_hook(_note_in(calls, path), with_kwargs=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                last = own(**inputs, **starts)
            except Exception as error:  # the user's code may raise anything
                raise ExportError(
                    f"{type(module).__name__}: forward failed: {type(error).__name__}: {error}",
                    hint="every tensor argument needs its shape: --shape x:1x3x64x64,flow:1x2x64x64; "
                    "a state without a default also needs --state NAME=POSITION",
                ) from error
        runs.append(calls)
    for (path, given, result), (_, given_too, other) in zip(*runs, strict=False):
        if same(given, given_too) and not same(result, other):
            if (shared := memory_outside(module, lambda own: own(**inputs, **starts))) is not None:
                raise ExportError(
                    f"{type(module).__name__}: forward remembers something outside the module: two fresh copies "
                    f"differ, which share {shared}",
                    hint="keep it in the module, where it belongs to one stream and can be reset: self.h = None in "
                    "__init__, set in forward; or take it as an argument and return it last; docs/own-module.md has it "
                    "before and after",
                )
            raise ExportError(
                f"{path or type(module).__name__}: forward is random in eval mode",
                hint="dropout as a module is off in eval mode; other random numbers must go",
            )
    if any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in flatten(last)[0]):
        raise ExportError(
            f"{type(module).__name__}: forward returns NaN for inputs of -1 to 1, by which its states are found",
            hint="a root or logarithm of what is below zero, which x.clamp(min=0).sqrt() avoids, or weights with NaN",
        )


def _note_in(calls: list[tuple[str, Any, Any]], path: str) -> Callable[..., None]:
    """A forward hook that records arguments and results of a module."""

    def note(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        calls.append((path, map_leaves(_copied, (args, kwargs)), map_leaves(_copied, result)))

    return note


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().nan_to_num() if is_float(leaf) else leaf.detach().clone()  # a NaN does not equal itself
