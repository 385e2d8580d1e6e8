"""Record the convolutions and matrix products that a cell computes, with the weights it uses.

What a cell computes is read off its calls, so it does not matter how it names, packs or normalises
its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["LinearMap", "Recorder"]


@dataclass(frozen=True)
class LinearMap:
    """One call: output = weight * input + bias, as a convolution with a 4-D weight.

    Attributes:
        flaw: why it is no same-size convolution with one weight per pair of channels, or None.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    flaw: str | None = None


class Recorder(TorchFunctionMode):
    """Context in which `maps` fills with the linear maps of plain 2-D convolutions and dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[LinearMap] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READERS:
            self.maps.append(_READERS[func](result, *args, **(kwargs or {})))
        return result


def _conv2d(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> LinearMap:
    half = tuple(size // 2 for size in weight.shape[2:])
    flaws = {
        f"stride {stride}": _pair(stride) != (1, 1),
        f"dilation {dilation}": _pair(dilation) != (1, 1),
        f"{groups} groups": groups != 1,
        f"padding {padding}": padding != "same" and _pair(padding) != half,
        "an even kernel": any(size % 2 == 0 for size in weight.shape[2:]),
    }
    return LinearMap(input, weight, bias, output, next((flaw for flaw, found in flaws.items() if found), None))


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearMap:
    flaw = None if input.dim() == 2 and weight.dim() == 2 else f"a dense layer on {input.dim()} axes"
    return LinearMap(input, weight[..., None, None], bias, output, flaw)


def _matmul(output: Tensor, input: Tensor, other: Tensor) -> LinearMap:
    return _linear(output, input, other.transpose(-1, -2) if other.dim() > 1 else other)


def _addmm(output: Tensor, bias: Tensor, input: Tensor, other: Tensor) -> LinearMap:
    return _linear(output, input, other.T, bias)


_READERS: dict[Callable[..., Any], Callable[..., LinearMap]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
}


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size) * (2 // len(tuple(size)))
