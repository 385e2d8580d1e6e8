"""Comparison of a step model with the module that it was made of, in float64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.contract import StateSpec
from stepcell.exporter.from_module.attributes import Inputs, Starts, random, state_leaves
from stepcell.exporter.from_module.frame_loops import frames_of_clip
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.from_module.untraced import advice_on_numbers, numbers_in
from stepcell.exporter.parity import TOLERANCE, Arrays, CheckClip, Run, check_equal

__all__ = ["check_same"]

_logger = logging.getLogger(__name__)
STEPS = 32
_CLIP = 8  # frames of a clip that a module takes whole: it is called with 1, 2, 3, ... of them


def check_same(original: nn.Module, model: LiftedModel, data: Inputs, starts: Starts) -> None:
    """Compare the step model with the original module in float64, each with its own state.

    A Python number that changes from call to call may take effect after these steps only, and is warned of.

    Raises:
        ParityError: they differ.
    """
    interface = model.interface
    names = [*(spec.name for spec in model.outputs), *(state.name for state in model.plain_states)]
    _, memory = interface.first(copy.deepcopy(original), data, starts)
    steps = _CLIP if interface.locals else STEPS

    def frames() -> Iterator[Arrays]:
        for step in range(steps):
            yield {name: random(tensor.shape, 100 + step).numpy() for name, tensor in data.items()}

    def original_run(_: CheckClip) -> Run:
        module = copy.deepcopy(original)
        kept: list[Any] = []

        def run(frame: Arrays) -> Arrays:
            tensors = {name: torch.from_numpy(array) for name, array in frame.items()}
            if kept:
                result, kept[:] = interface.step(module, tensors, kept)
            else:
                result, kept[:] = interface.first(module, tensors, starts)
            return _arrays(names, [*interface.outputs(result), *_states(kept)])

        return run

    def clip_run(_: CheckClip) -> Run:
        clip = [{name: torch.from_numpy(array) for name, array in frame.items()} for frame in frames()]
        found = frames_of_clip(original, interface, clip)

        def run(_: Arrays) -> Arrays:
            outputs, memory = next(found)
            return _arrays(names, [*outputs, *_states(memory)])

        return run

    states = [torch.zeros(leaf.shape or (1,), dtype=leaf.dtype) for leaf in state_leaves(memory)]
    states += [torch.zeros(_rows(model, states, state)) for state in model.states[len(states) :]]
    for state, tensor in zip(model.states, states, strict=True):
        if state.name in model.initial:
            tensor += _whole(model.initial[state.name], state)
    plain = [state.name for state in model.plain_states]
    own = states[len(plain) :]  # what only the step model has: it is fed back

    def lifted_step(frame: Arrays, before: Arrays) -> Arrays:
        results = model(*(torch.from_numpy(array) for array in (*frame.values(), *before.values())), *own)
        own[:] = results[len(names) :]
        return _arrays(names, results[: len(names)])

    check_equal(
        clip_run if interface.locals else original_run,
        lifted_step,
        [CheckClip("random frames", steps, frames, _arrays(plain, states[: len(plain)]))],
        TOLERANCE["float64"],
        subject="the original module",
        hint=_remembers(model),
    )
    if numbers := numbers_in(model.interface.scratch, model.module):
        kinds = " or ".join(sorted(set(numbers.values())))
        _logger.warning(
            f"{', '.join(numbers)}: {kinds} that changes from call to call is fixed in the file; the first {steps} "
            "steps are equal, later ones may not be: keep it as a tensor, if the module reads it"
        )


def _arrays(names: Sequence[str], tensors: Sequence[Tensor]) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in zip(names, tensors, strict=True)}


def _rows(model: LiftedModel, states: Sequence[Tensor], started: StateSpec) -> int:
    """The number of streams in `started`."""
    axis = model.states[0].batch_axis
    return 1 if axis is None or started.batch_axis is None else states[0].shape[axis]


def _whole(value: Tensor, state: StateSpec) -> Tensor:
    """An initial value with the batch axis."""
    return value if state.batch_axis is None else value.unsqueeze(state.batch_axis)


def _states(memory: Sequence[Any]) -> list[Tensor]:
    """The states as the step model has them: one element instead of no axes."""
    return [leaf if leaf.dim() else leaf.reshape(1) for leaf in state_leaves(memory)]


def _remembers(model: LiftedModel) -> str:
    """What a module that is not its states may remember besides."""
    if numbers := numbers_in(model.interface.scratch, model.module):
        return advice_on_numbers(numbers)
    return "the module remembers something that is no tensor attribute and no returned state"
