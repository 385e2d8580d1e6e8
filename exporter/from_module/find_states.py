"""Interface of a module that is called once per step: its data arguments and the places of its states.

A state is an argument that a call takes from the result of the previous one, or an attribute that one
call sets and the next one reads. Both are found by calling copies of the module.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import Inputs, Starts, StateAttribute, is_state, same, snapshot
from stepcell.exporter.from_module.determinism import check_deterministic
from stepcell.exporter.from_module.trees import flatten, map_leaves

__all__ = ["Argument", "Interface", "find_interface", "outputs_of"]


@dataclass(frozen=True)
class Argument:
    """An argument of `forward` that takes a part of the previous result.

    Attributes:
        index: position or key in the result of `forward`; None: all of it.
    """

    name: str
    index: int | str | None

    def __str__(self) -> str:
        return self.name

    def pick(self, result: Any) -> Any:
        """The state in a result; KeyError, IndexError or TypeError where there is none."""
        return result if self.index is None else result[self.index]


@dataclass(frozen=True)
class Interface:
    """Data arguments and places of states.

    Attributes:
        arguments: state arguments.
        attributes: attributes that hold states.
        scratch: attributes that a call changes and no later call reads.
        timed, time_axis: inputs that the module takes as sequences (of one frame), and their time axis.
        output_axes: the time axis of each output, None where it has none.
    """

    arguments: tuple[Argument, ...] = ()
    attributes: tuple[StateAttribute, ...] = ()
    scratch: tuple[StateAttribute, ...] = ()
    timed: tuple[str, ...] = ()
    time_axis: int = 0
    output_axes: tuple[int | None, ...] = ()

    @property
    def places(self) -> tuple[Argument | StateAttribute, ...]:
        return (*self.arguments, *self.attributes)

    def first(self, module: nn.Module, inputs: Inputs, starts: Starts) -> tuple[Any, list[Any]]:
        """The first call, on a fresh module: state arguments from `starts`, or omitted.

        Returns:
            The result of `forward`, and the value of every place afterwards.
        """
        return self._call(module, inputs, dict(starts))

    def step(self, module: nn.Module, inputs: Inputs, memory: Sequence[Any]) -> tuple[Any, list[Any]]:
        """A later call: every place is set to its value first."""
        count = len(self.arguments)
        for attribute, value in zip(self.attributes, memory[count:], strict=True):
            attribute.set(module, value)
        given = {argument.name: value for argument, value in zip(self.arguments, memory[:count], strict=True)}
        return self._call(module, inputs, given)

    def outputs(self, result: Any) -> list[Tensor]:
        """The output tensors in a result, without a time axis."""
        tensors = [leaf for leaf in flatten(outputs_of(result, self.arguments))[0] if isinstance(leaf, Tensor)]
        axes = self.output_axes or (None,) * len(tensors)
        return [t if axis is None else t.squeeze(axis) for t, axis in zip(tensors, axes, strict=True)]

    def _call(self, module: nn.Module, inputs: Inputs, states: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        frames = {name: x.unsqueeze(self.time_axis) if name in self.timed else x for name, x in inputs.items()}
        result = module(**frames, **states)
        values = [argument.pick(result) for argument in self.arguments]
        return result, [*values, *(attribute.get(module) for attribute in self.attributes)]


def outputs_of(result: Any, arguments: Sequence[Argument]) -> Any:
    """The part of a result that is not a state; all of it if it has nothing else."""
    taken = [argument.index for argument in arguments]
    if None in taken:
        return result
    if isinstance(result, Mapping):
        return {key: value for key, value in result.items() if key not in taken} or result
    if isinstance(result, (tuple, list)):
        positions = {index % len(result) for index in taken if isinstance(index, int)}
        rest = [value for position, value in enumerate(result) if position not in positions]
        return rest or result
    return result


def find_interface(module: nn.Module, inputs: Inputs, returned: Mapping[str, int], starts: Starts) -> Interface:
    """Find a module's states by calling copies of it; `module` itself is not changed.

    Args:
        module: in eval mode and float64.
        inputs: random data inputs.
        returned: state arguments given by the user, each with its position in the result.
        starts: zeros for those of them that need a value in the first call.

    Raises:
        ExportError: `forward` cannot be called like this, is random, or has no state.
    """
    check_deterministic(module, inputs, starts)
    arguments = tuple(Argument(name, index) for name, index in returned.items())
    if arguments:
        if why := _refusal(module, inputs, arguments, starts):
            raise ExportError(f"--state {arguments[0].name}={arguments[0].index}: {why}")
    else:
        arguments = _find_arguments(module, inputs, starts)
    if foreign := set(starts) - {argument.name for argument in arguments}:
        raise ExportError(
            f"forward needs {min(foreign)}, which is not a state: no part of the result can be passed for it",
            hint="give its shape in --shape",
        )
    interface = _find_attributes(module, inputs, Interface(arguments), starts)
    if not interface.places:
        raise ExportError(
            f"{type(module).__name__}: no state: no argument takes a part of the previous result, and no attribute "
            "that a call changes is read by the next",
            hint="a state argument defaults to None and is returned last; --state NAME=POSITION names another",
        )
    return interface


def _find_arguments(module: nn.Module, inputs: Inputs, starts: Starts) -> tuple[Argument, ...]:
    """State arguments: those that default to None or have no default, returned last and in order."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = [p.name for p in parameters if p.kind in kinds and p.name not in inputs and p.default in (None, p.empty)]
    groups = [free] if len(free) < 2 else [free, *([name] for name in reversed(free))]  # states come last
    result, _ = Interface().first(copy.deepcopy(module), inputs, starts)
    for names in filter(None, groups):
        choices: list[list[int | str | None]] = [list(range(-len(names), 0))]
        if isinstance(result, Mapping):
            choices = [list(names)]
        elif not isinstance(result, (tuple, list)):
            choices = []
        if len(names) == 1:
            choices.append([None])
        for indices in choices:
            arguments = tuple(Argument(name, index) for name, index in zip(names, indices, strict=True))
            if _refusal(module, inputs, arguments, starts) is None:
                return arguments
    return ()


def _refusal(module: nn.Module, inputs: Inputs, arguments: tuple[Argument, ...], starts: Starts) -> str | None:
    """The reason why `arguments` are not states, or None."""
    interface, own = Interface(arguments), copy.deepcopy(module)
    try:
        _, memory = interface.first(own, inputs, starts)
        for each in memory:
            if not any(map(is_state, flatten(each)[0])):
                return "the result has no floating-point tensor there"
        before = copy.deepcopy(own)
        fed, after = interface.step(own, inputs, memory)
        shifted, _ = interface.step(before, inputs, map_leaves(_shifted, memory))
        interface.step(own, inputs, after)  # a third call works too
    except Exception as error:  # the user's code may raise anything for a wrong argument
        return f"forward does not accept it: {type(error).__name__}: {error}"
    if [_shape(leaf) for leaf in flatten(memory)[0]] != [_shape(leaf) for leaf in flatten(after)[0]]:
        return "its shape changes from call to call"
    return "it changes nothing" if same(fed, shifted) else None


def _find_attributes(module: nn.Module, inputs: Inputs, interface: Interface, starts: Starts) -> Interface:
    own = copy.deepcopy(module)
    rng = torch.Generator().manual_seed(1)
    frames = [
        {
            name: torch.randn(t.shape, generator=rng, dtype=t.dtype) if t.is_floating_point() else t
            for name, t in inputs.items()
        }
        for _ in range(3)
    ]
    _, memory = interface.first(own, frames[0], starts)
    snapshots, before = [snapshot(own)], own
    for frame in frames[1:]:
        before = copy.deepcopy(own)
        previous = memory
        result, memory = interface.step(own, frame, memory)
        snapshots.append(snapshot(own))
    changed = [s for s in snapshots[-1] if any(not same(snapshots[0].get(s), each[s]) for each in snapshots[1:])]
    attributes, scratch = [], []
    for attribute in changed:
        if not any(map(is_state, flatten(snapshots[-1][attribute])[0])):
            scratch.append(attribute)
            continue
        shapes = [[_shape(leaf) for leaf in flatten(each.get(attribute))[0]] for each in snapshots[1:]]
        steady = shapes[0] == shapes[1]
        other = copy.deepcopy(before)
        attribute.set(other, map_leaves(_shifted, attribute.get(other)))
        shifted, _ = interface.step(other, frames[2], previous)
        left = snapshot(other)
        watched = [s for s in changed if steady or s != attribute]
        if same(result, shifted) and all(same(left[s], snapshots[-1][s]) for s in watched):
            scratch.append(attribute)
        elif steady:
            attributes.append(attribute)
        else:
            raise ExportError(
                f"{attribute}: a state whose shape changes from call to call: {shapes[0]}, then {shapes[1]}"
            )
    return replace(interface, attributes=tuple(attributes), scratch=tuple(scratch))


def _shifted(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not is_state(leaf):
        return leaf
    return leaf + torch.rand(leaf.shape, generator=torch.Generator().manual_seed(2), dtype=leaf.dtype) - 0.25


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else None
