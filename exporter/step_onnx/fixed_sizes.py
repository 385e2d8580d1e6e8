"""Where the user's code turns a dynamic size into a Python number while it is traced."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import stepcell

__all__ = ["fixed_sizes"]

_OWN = Path(stepcell.__file__).resolve().parents[1]
_LIBRARIES = (
    str(Path(torch.__file__).resolve().parent),
    str(_OWN / "exporter"),
    str(_OWN / "models"),
    str(_OWN / "stepcell"),
)


_NUMBERS = (
    (torch.Tensor, "__len__"),
    (torch.SymInt, "__int__"),
    (torch.SymInt, "__index__"),
    (torch.SymFloat, "__int__"),
    (torch.SymFloat, "__round__"),
)


@contextlib.contextmanager
def fixed_sizes() -> Iterator[list[str]]:
    """Collects the places as `net.py, line 12`, in order.

    `len(x)`, `range(x.shape[0])`, and `int` or `round` of a size, must return a number in Python, so torch's tracer
    takes that of the example, and the file has it at every size, with no word.
    """
    places: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(value: Any, *rest: Any) -> Any:
            caller = sys._getframe(1)
            file = caller.f_code.co_filename
            dynamic = isinstance(
                value.shape[0] if isinstance(value, torch.Tensor) else value, (torch.SymInt, torch.SymFloat)
            )
            if dynamic and Path(file).is_file() and not str(Path(file).resolve()).startswith(_LIBRARIES):
                places.append(f"{Path(file).name}, line {caller.f_lineno}")
            return function(value, *rest)

        return noted

    with contextlib.ExitStack() as stack:
        for owner, name in _NUMBERS:
            stack.enter_context(patch.object(owner, name, noting(getattr(owner, name))))
        yield places
