"""Float64 evaluation of modules that create float32 tensors themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepcell.exporter.from_module.trees import flatten

__all__ = ["Float64"]


class Float64(TorchFunctionMode):
    """Context in which float tensors that are made from no float tensor are float64.

    So the states and constants that a module creates (`torch.zeros(...)`, `mask.float()`) fit the
    float64 weights. The default dtype of the process is not touched; other threads see nothing.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32:
            return result
        given = flatten((args, kwargs or {}))[0]
        made = not any(isinstance(each, Tensor) and each.is_floating_point() for each in given)
        return result.double() if made else result
