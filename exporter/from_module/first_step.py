"""What a step model starts from: states of zeros, other initial values, or a first call of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.contract import Spec, StateSpec
from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import Inputs, StateAttribute, demote_buffers, is_state
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.from_module.trees import flatten, map_leaves

__all__ = ["start_as"]


def start_as(model: LiftedModel, original: nn.Module, fresh: nn.Module, data: Inputs, memory: Sequence[Any]) -> None:
    """Let the model start as a fresh module does.

    A run starts with states of zeros, or with the values that the module's attributes have before its first call. Where
    neither computes what the first call computes (the first frame is its own predecessor), the model keeps both calls.

    Args:
        original: for a first call.
        fresh: the same with what is replaced before tracing; the model may keep it.
        memory: the value of every place after a first call.
    """
    interface, starts = model.interface, model.starts
    expected = interface.first(copy.deepcopy(original), data, starts)
    zeros = map_leaves(lambda leaf: torch.zeros_like(leaf) if is_state(leaf) else leaf, list(memory))
    if _begins_as(model, data, zeros, expected):
        return
    kept = _kept(model, fresh, memory)
    if kept is not None and _begins_as(model, data, kept, expected):
        model.initial = _initial(model, kept)
        return
    demote_buffers(fresh, [attribute for attribute in interface.changing if attribute.exists(fresh)])
    model.fresh = fresh
    first = model.plain_states[0]
    axis = None if first.batch_axis is None or None in model.output_axes else 0
    specs: list[Spec] = [*model.inputs, *model.outputs, *model.states]
    names = {spec.name for spec in specs}
    name = next(name for name in ("started", "started_", "started__") if name not in names)
    model.states.append(StateSpec(name=name, shape=(1,) if axis is None else (first.streams,), batch_axis=axis))


def _begins_as(model: LiftedModel, data: Inputs, values: Sequence[Any], expected: tuple[Any, list[Any]]) -> bool:
    """Whether a step from these states is the first call."""
    try:
        got = model.interface.step(copy.deepcopy(model.module), data, values)
    except Exception:  # the user's code may raise anything
        return False
    ones, others = (flatten((model.interface.tensors(result), memory))[0] for result, memory in (expected, got))
    return len(ones) == len(others) and all(
        _is_close(other, one) for one, other in zip(ones, others, strict=True) if isinstance(one, Tensor)
    )


def _is_close(one: Any, other: Tensor) -> bool:
    """Equal but for the rounding of float64."""
    if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return int((one != other).sum()) <= 1  # rounding may decide one element
    return not one.numel() or bool((one - other).abs().max() <= 1e-10 * (1 + other.abs().max()))


def _kept(model: LiftedModel, fresh: nn.Module, memory: Sequence[Any]) -> list[Any] | None:
    """The values of the states before the first call, where all are attributes that exist then."""
    values = []
    for place, after in zip(model.interface.places, memory, strict=True):
        if not isinstance(place, StateAttribute) or not place.exists(fresh):
            return None
        value = place.get(fresh)
        (one, shape), (other, shape_after) = flatten(value), flatten(after)
        if shape != shape_after or [getattr(a, "shape", None) for a in one] != [
            getattr(a, "shape", None) for a in other
        ]:
            return None
        values.append(copy.deepcopy(value))
    return values


def _initial(model: LiftedModel, values: Sequence[Any]) -> dict[str, Tensor]:
    """Initial values by state, without the batch axis.

    Raises:
        ExportError: the rows of the batch start from different values, or a state of integers is not zero.
    """
    leaves = [leaf for value in values for leaf in flatten(value)[0] if is_state(leaf)]
    found = {}
    for state, leaf in zip(model.plain_states, leaves, strict=True):
        if not leaf.any():
            continue
        if not leaf.is_floating_point():
            raise ExportError(
                f"{state.name}: a state of {leaf.dtype} that does not start from zeros",
                hint="keep it as a float, or count from zero",
            )
        value = leaf.reshape(1) if leaf.dim() == 0 else leaf
        rows = [value] if state.batch_axis is None else value.unbind(state.batch_axis)
        if any(not torch.equal(row, rows[0]) for row in rows):
            raise ExportError(f"{state.name}: the rows of the batch start from different values", hint="give them one")
        found[state.name] = rows[0].float()
    return found
