"""Reshaping of frame sequences for training and offline use: time axis into batch axis and back.

Layouts: "TBCHW" (time first, the default) and "BTCHW".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

__all__ = ["Layout", "batch_to_time", "seq_wise", "time_to_batch"]

Layout = Literal["TBCHW", "BTCHW"]


def time_to_batch(x: Tensor, layout: Layout = "TBCHW") -> tuple[Tensor, int]:
    """(T, B, ...) or (B, T, ...) -> (T*B, ...) in time-major order, and the batch size for `batch_to_time`."""
    if x.dim() < 3:
        raise ValueError(f"x: expected at least 3 dimensions ({layout}), got shape {tuple(x.shape)}")
    if _batch_first(layout):
        x = x.transpose(0, 1)
    return x.flatten(0, 1), x.shape[1]


def batch_to_time(x: Tensor, batch: int, layout: Layout = "TBCHW") -> Tensor:
    """(T*B, ...) -> (T, B, ...) or (B, T, ...)."""
    if x.shape[0] % batch:
        raise ValueError(f"x: first dimension {x.shape[0]} is not a multiple of the batch size {batch}")
    x = x.reshape(-1, batch, *x.shape[1:])
    return x.transpose(0, 1) if _batch_first(layout) else x


def seq_wise(function: Callable[[Tensor], Tensor], layout: Layout = "TBCHW") -> Callable[[Tensor], Tensor]:
    """Apply a per-frame function or module to a whole sequence in one call."""

    def apply(x: Tensor) -> Tensor:
        flat, batch = time_to_batch(x, layout)
        return batch_to_time(function(flat), batch, layout)

    return apply


def _batch_first(layout: Layout) -> bool:
    if layout not in ("TBCHW", "BTCHW"):
        raise ValueError(f"layout: expected 'TBCHW' or 'BTCHW', got {layout!r}")
    return layout == "BTCHW"
