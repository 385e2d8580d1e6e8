"""Evaluation of a module in one dtype of floats and on the CPU, whatever dtypes and devices its code names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Floats", "is_float"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONVERSIONS = {"float", "half", "bfloat16", "double"}
_CONTAINERS = (tuple, list, dict)
# Functions whose Python numbers become constants of the graph, in its dtype; those of others stay float32 attributes.
_ARITHMETIC = {"add", "sub", "rsub", "subtract", "mul", "multiply", "div", "rdiv", "divide", "truediv", "true_divide"}
_ARITHMETIC |= {"radd", "rmul", "rtruediv", "pow", "rpow", "where", "maximum", "minimum"}


def is_float(value: object) -> bool:
    """Whether a value is a tensor of real floating-point numbers."""
    return isinstance(value, Tensor) and value.dtype in _FLOATS


class Floats(TorchFunctionMode):
    """Context in which every floating-point tensor has one dtype and lies on the CPU.

    Dtypes that the code names (`x.float()`, `torch.zeros(..., dtype=torch.float32)`), that it takes from the default
    (`torch.zeros(...)`) and that constants have become `dtype`; CUDA devices that it names become the CPU. So a module
    written for float32 computes in float64, and one that converts its pixels itself in float16. The default dtype of
    the process is not touched; other threads see nothing.

    Args:
        dtype: of every tensor.
        constants: round the numbers that the code names (`0.1 * x`) to this dtype first, as a file of this precision
            has them; None: as they are.
    """

    def __init__(self, dtype: torch.dtype, *, constants: torch.dtype | None = None) -> None:
        super().__init__()
        self._dtype, self._constants = dtype, constants

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        subject = args[0] if args else None
        if isinstance(subject, Tensor):
            if name in _CONVERSIONS and len(args) == 1:
                return subject.to(self._dtype)
            if name in ("cuda", "cpu"):
                return subject
            if name == "type" and len(args) == 2 and isinstance(args[1], (str, type)):
                return subject.to(self._dtype) if "Float" in str(args[1]) or "Half" in str(args[1]) else func(*args)
        if self._constants is not None and name.partition(".")[0].strip("_") in _ARITHMETIC:
            args = tuple(self._rounded(value) if type(value) is float else value for value in args)
        in_place = name.endswith("_") or name == "__setitem__"
        given = [args[0], *map(self._argument, args[1:])] if in_place and args else list(map(self._argument, args))
        named = {key: self._argument(value) for key, value in (kwargs or {}).items()}
        result = func(*given, **named)
        if is_float(result) and result.dtype != self._dtype and not in_place:
            if self._constants is not None and not any(isinstance(value, Tensor) for value in args):
                result = result.to(self._constants)  # torch.tensor(0.1)
            return result.to(self._dtype)
        return result

    def _rounded(self, value: float) -> float:
        with torch._C.DisableTorchFunction():
            return float(torch.tensor(value, dtype=self._constants))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.dtype in _FLOATS and value.dtype != self._dtype else value
        if isinstance(value, torch.dtype):
            return self._dtype if value in _FLOATS else value
        if isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] == "cuda"):
            return torch.device("cpu")
        if type(value) in _CONTAINERS:
            values = value.values() if isinstance(value, dict) else value
            new = [self._argument(each) for each in values]
            return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)
        return value
