"""`triton.jit` with a type: a decorator that keeps the function's signature for readers and checkers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import triton

__all__ = ["jit"]

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

jit: Callable[[_Kernel], _Kernel] = triton.jit
