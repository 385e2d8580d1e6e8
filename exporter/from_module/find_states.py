"""Interface of a module that is called once per step: its data arguments and the places of its states.

A state is an argument that a call takes from the result of the previous one, or an attribute that one
call sets and the next one reads. Both are found by calling copies of the module.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.errors import ExportError
from stepcell.exporter.floats import is_float
from stepcell.exporter.from_module.attributes import Inputs, Starts, StateAttribute, is_state, same, snapshot
from stepcell.exporter.from_module.determinism import check_deterministic
from stepcell.exporter.from_module.local_states import LocalState
from stepcell.exporter.from_module.trees import flatten, map_leaves

__all__ = ["Argument", "Interface", "find_interface", "outputs_of"]

_CALLS = 6  # along which attributes are judged


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
        locals: states that live in variables of `forward`, between the calls of a submodule.
        scratch: attributes that a call changes and no later call reads.
        timed, time_axis: inputs that the module takes as sequences (of one frame), and their time axis.
        keeps_time: the step keeps that axis.
        output_axes: the time axis of each output, None where it has none.
    """

    arguments: tuple[Argument, ...] = ()
    attributes: tuple[StateAttribute, ...] = ()
    locals: tuple[LocalState, ...] = ()
    scratch: tuple[StateAttribute, ...] = ()
    timed: tuple[str, ...] = ()
    time_axis: int = 0
    keeps_time: bool = False
    output_axes: tuple[int | None, ...] = ()

    @property
    def places(self) -> tuple[Argument | StateAttribute | LocalState, ...]:
        return (*self.arguments, *self.attributes, *self.locals)

    @property
    def changing(self) -> tuple[StateAttribute, ...]:
        """The attributes that a call changes."""
        return (*self.attributes, *self.scratch)

    def first(self, module: nn.Module, inputs: Inputs, starts: Starts) -> tuple[Any, list[Any]]:
        """The first call, on a fresh module: state arguments from `starts`, or omitted.

        Returns:
            The result of `forward`, and the value of every place afterwards.
        """
        return self._call(module, self._sequences(inputs), dict(starts), {})

    def over_clip(self, module: nn.Module, frames: Sequence[Inputs]) -> tuple[Any, list[Any]]:
        """One call with all frames, on a fresh module without state arguments; the places have the last values."""
        first, *_ = frames
        join = torch.cat if self.keeps_time else torch.stack
        clip = {
            name: join([frame[name] for frame in frames], self.time_axis) if name in self.timed else tensor
            for name, tensor in first.items()
        }
        return self._call(module, clip, {}, {})

    def step(self, module: nn.Module, inputs: Inputs, memory: Sequence[Any]) -> tuple[Any, list[Any]]:
        """A later call: every place is set to its value first."""
        # The module may change a container in place; the caller's must stay as it is.
        values = dict(zip(self.places, map(_same_leaves, memory), strict=True))
        for attribute in self.attributes:
            attribute.set(module, values[attribute])
        given = {argument.name: values[argument] for argument in self.arguments}
        return self._call(module, self._sequences(inputs), given, {each: values[each] for each in self.locals})

    def outputs(self, result: Any) -> list[Tensor]:
        """The output tensors in a result, without a time axis."""
        tensors = self.tensors(result)
        axes = self.output_axes or (None,) * len(tensors)
        return [
            t if axis is None or self.keeps_time else t.squeeze(axis) for t, axis in zip(tensors, axes, strict=True)
        ]

    def tensors(self, result: Any) -> list[Tensor]:
        """The output tensors in a result as they are."""
        return [leaf for leaf in flatten(outputs_of(result, self.arguments))[0] if isinstance(leaf, Tensor)]

    def _sequences(self, inputs: Inputs) -> Inputs:
        if self.keeps_time:
            return inputs
        return {name: x.unsqueeze(self.time_axis) if name in self.timed else x for name, x in inputs.items()}

    def _call(
        self, module: nn.Module, inputs: Inputs, states: Mapping[str, Any], local: Mapping[LocalState, Any]
    ) -> tuple[Any, list[Any]]:
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(place.exchanged(module, local.get(place))) for place in self.locals]
            result = module(**inputs, **states)
        values = [argument.pick(result) for argument in self.arguments]
        values += [attribute.get(module) for attribute in self.attributes]
        return result, [*map(_same_leaves, values), *(values for (values,) in found)]


def _same_leaves(value: Any) -> Any:
    return map_leaves(lambda leaf: leaf, value)


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
    """Find the states that a module keeps or takes and returns, by calling copies of it; `module` is not changed.

    Args:
        module: in eval mode and float64.
        inputs: random data inputs.
        returned: state arguments given by the user, each with its position in the result.
        starts: zeros for those of them that need a value in the first call.

    Raises:
        ExportError: `forward` cannot be called like this, or is random.
    """
    check_deterministic(module, inputs, starts)
    arguments = tuple(Argument(name, index) for name, index in returned.items())
    if arguments:
        result, _ = Interface().first(copy.deepcopy(module), inputs, starts)
        for name, index in returned.items():
            if isinstance(result, (tuple, list)) and not -len(result) <= index < len(result):
                raise ExportError(f"--state {name}={index}: forward returned {len(result)} values, counted from 0")
        if why := _refusal(module, inputs, arguments, starts):
            raise ExportError(f"--state {arguments[0].name}={arguments[0].index}: {why}")
    else:
        arguments = _find_arguments(module, inputs, starts)
    if foreign := set(starts) - {argument.name for argument in arguments}:
        raise ExportError(
            f"forward needs {min(foreign)}, which is not a state: no part of the result can be passed for it",
            hint="give its shape in --shape",
        )
    return _find_attributes(module, inputs, Interface(arguments), starts)


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
            if not any(map(is_float, flatten(each)[0])):
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
    """Attributes that a call changes; those whose value matters at one of several calls are states."""
    own = copy.deepcopy(module)
    rng = torch.Generator().manual_seed(1)
    frames = [
        {name: torch.randn(t.shape, generator=rng, dtype=t.dtype) if is_float(t) else t for name, t in inputs.items()}
        for _ in range(_CALLS)
    ]
    _, memory = interface.first(own, frames[0], starts)
    calls: list[_Call] = []
    after = [snapshot(own)]
    for frame in frames[1:]:
        before, given = copy.deepcopy(own), memory
        result, memory = interface.step(own, frame, memory)
        after.append(snapshot(own))
        calls.append(_Call(before, frame, given, result, after[-1]))
    changed = [s for s in after[-1] if any(not same(after[0].get(s), each[s]) for each in after[1:])]
    attributes, scratch = [], []
    for attribute in changed:
        shapes = [[_shape(leaf) for leaf in flatten(each.get(attribute))[0]] for each in after[1:]]
        steady = all(each == shapes[0] for each in shapes)
        watched = [s for s in changed if steady or s != attribute]
        has_tensors = any(map(is_state, flatten(after[-1][attribute])[0]))
        if not has_tensors or not _matters(interface, attribute, calls, watched):
            scratch.append(attribute)
        elif steady:
            attributes.append(attribute)
        else:
            grows = len(shapes[0]) < len(shapes[-1])
            raise ExportError(
                f"{attribute}: a state whose shape changes from call to call: {shapes[0]}, then {shapes[1]}",
                hint="a step has room for a fixed number of tensors: a deque with `maxlen`, filled at the first call: "
                "`while len(past) < past.maxlen: past.append(torch.zeros_like(x))`"
                if grows
                else "a state has one shape at all steps",
            )
    return replace(interface, attributes=tuple(attributes), scratch=tuple(scratch))


@dataclass(frozen=True)
class _Call:
    """A call: the module before it, what it was given and returned, and the attributes after it."""

    before: nn.Module
    frame: Inputs
    memory: list[Any]
    result: Any
    after: Mapping[StateAttribute, Any]


def _matters(
    interface: Interface, attribute: StateAttribute, calls: Sequence[_Call], watched: Sequence[StateAttribute]
) -> bool:
    """Whether another value of an attribute changes a result, or an attribute, at one of the calls."""
    for call in calls:
        if not attribute.exists(call.before):
            continue
        for change in (_shifted, _far):
            other = copy.deepcopy(call.before)
            attribute.set(other, map_leaves(change, attribute.get(other)))
            try:
                result, _ = interface.step(other, call.frame, call.memory)
            except Exception:  # an index out of bounds, say: it matters
                return True
            left = snapshot(other)
            if not same(call.result, result) or not all(same(left[s], call.after[s]) for s in watched):
                return True
    return False


def _shifted(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not is_state(leaf):
        return leaf
    if leaf.dtype == torch.bool:
        return ~leaf
    if not is_float(leaf):
        return leaf + 1
    return leaf + torch.rand(leaf.shape, generator=torch.Generator().manual_seed(2), dtype=leaf.dtype) - 0.25


def _far(leaf: Any) -> Any:
    """A value far off: one beyond a threshold."""
    return 8 * (1 + leaf.abs().max()) - leaf if is_float(leaf) else _shifted(leaf)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else None
