"""Which axes count streams: what enters a row of the batch must come out of that row alone, found by running."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from stepcell.exporter.floats import is_float
from stepcell.exporter.from_module.attributes import random
from stepcell.exporter.from_module.model import LiftedModel

__all__ = ["axes_of_size", "independent_axes"]

_COMBINATIONS = 64  # of one axis for each output and state


def axes_of_size(shape: Sequence[int], size: int) -> list[int | None]:
    """The axes of a size; None in their place where there are none."""
    return [axis for axis, length in enumerate(shape) if length == size] or [None]


def independent_axes(
    model: LiftedModel,
    frames: Sequence[Tensor],
    states: Sequence[Tensor],
    batch_axes: Sequence[int],
    choices: Sequence[Sequence[int | None]],
) -> list[int | None] | None:
    """The axis of each output and state along which rows do not depend on each other; None: there are no such axes.

    Args:
        frames: inputs of a step, of two or more rows.
        states: states after a first call.
        batch_axes: of the inputs.
        choices: axes of each output and each state that may be the one; None: no axis, as of a counter that all rows
            share, which the test leaves as it is.
    """
    count = frames[0].shape[batch_axes[0]]
    before = model(*frames, *states)
    for axes in itertools.islice(itertools.product(*choices), _COMBINATIONS):
        of_states = axes[len(axes) - len(states) :]
        moved = [(x, axis if x.shape[axis] == count else None) for x, axis in zip(frames, batch_axes, strict=True)]
        moved += zip(states, of_states, strict=True)
        for row in (0, count - 1):
            others = torch.tensor([other for other in range(count) if other != row])
            after = model(*(_with_row(tensor, axis, row, seed) for seed, (tensor, axis) in enumerate(moved)))
            if not all(
                axis is None or _is_same(one.index_select(axis, others), two.index_select(axis, others))
                for one, two, axis in zip(before, after, axes, strict=True)
            ):
                break
        else:
            return list(axes)
    return None


def _with_row(tensor: Tensor, axis: int | None, row: int, seed: int) -> Tensor:
    """A copy with other values in one row."""
    if axis is None:
        return tensor
    changed = tensor.clone()
    part = changed.select(axis, row)
    if is_float(part):
        part += random(part.shape, seed)
    elif part.dtype == torch.bool:
        part.logical_not_()
    else:
        part += 1
    return changed


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of float64."""
    return torch.allclose(one.double(), other.double(), rtol=1e-9, atol=1e-9, equal_nan=True)
