"""Modules whose `forward` takes a clip and loops over its frames, with the state in a variable of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import Inputs, Starts, StateAttribute, random, same
from stepcell.exporter.from_module.find_states import Interface
from stepcell.exporter.from_module.local_states import find_local_states
from stepcell.exporter.from_module.trees import flatten
from stepcell.exporter.from_module.untraced import advice_on_numbers, numbers_in

__all__ = ["find_in_loop", "frames_of_clip"]

_FRAMES = 3
_SQUEEZED = (
    3,
    5,
)  # axes of inputs that lose the time axis; of four, (time, channels, height, width), it stays as batch
_HELP = (
    "write it as one step, the state an argument that is returned last: `def forward(self, x, h=None): ... return y, h`"
)


def find_in_loop(module: nn.Module, data: Inputs, scratch: Sequence[StateAttribute]) -> tuple[Interface, Inputs]:
    """The states that `forward` passes from frame to frame of a clip, and the inputs of one frame.

    Args:
        module: in eval mode and float64; it keeps no state and takes none.
        scratch: attributes that a call changes and that are no tensors.

    Raises:
        ExportError: there is no such state, or none that a submodule receives and returns.
    """
    rank = max(tensor.dim() for tensor in data.values())
    timed = tuple(name for name, tensor in data.items() if tensor.dim() == rank)
    depends = False
    for axis in (0, 1) if rank >= 3 else ():
        clip, short = (_of_length(data, timed, axis, length) for length in (_FRAMES, 2))
        try:
            states = find_local_states(copy.deepcopy(module), clip, _FRAMES)
            frame = _of_length(data, timed, axis, 1)
            interface = Interface(locals=states)
            once = interface.tensors(interface.first(copy.deepcopy(module), frame, {})[0])
            long, two = (interface.tensors(copy.deepcopy(module)(**each)) for each in (clip, short))
        except Exception:  # an axis along which it does not run is not time
            continue
        if not states:
            depends = depends or _reads_the_past(module, clip, timed, axis)
            continue
        grown = tuple(_grown(one, other) for one, other in zip(two, long, strict=False))
        interface = replace(
            interface,
            timed=timed,
            time_axis=axis,
            keeps_time=rank not in _SQUEEZED,
            output_axes=grown if len(two) == len(long) else (None,) * len(once),
        )
        if interface.keeps_time:
            return interface, frame
        return interface, {name: each.squeeze(axis) if name in timed else each for name, each in frame.items()}
    called = copy.deepcopy(module)
    called(**data)
    raise _no_state(called, depends, scratch)


def check_directions(module: nn.Module, interface: Interface, data: Inputs, starts: Starts) -> None:
    """A bidirectional layer may run over an axis inside a frame, but not carry a state from frame to frame.

    Raises:
        ExportError: it takes a state, at the second call of a run.
    """
    own = copy.deepcopy(module)
    given: list[str] = []

    def note(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: given.append(path) if args[1:] or kwargs.get("hx") is not None else None

    for path, child in own.named_modules():
        if isinstance(child, nn.RNNBase) and child.bidirectional:
            child.register_forward_pre_hook(note(path), with_kwargs=True)
    _, memory = interface.first(own, data, starts)
    given.clear()
    interface.step(own, data, memory)
    if given:
        raise ExportError(
            f"{type(module).__name__}: {given[0] or 'it'} is bidirectional and carries a state from frame to frame",
            hint=_bidirectional(module),
        )


def frames_of_clip(
    module: nn.Module, interface: Interface, frames: Sequence[Inputs]
) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """Outputs and states after each frame, from calls of the module with all frames up to it.

    Raises:
        ExportError: a later frame changes an earlier output.
    """
    result, _ = interface.over_clip(copy.deepcopy(module), frames)
    whole = interface.tensors(result)
    for number in range(len(frames)):
        result, memory = interface.over_clip(copy.deepcopy(module), frames[: number + 1])
        now = _at(interface, interface.tensors(result), number + 1, number)
        for one, other in zip(now, _at(interface, whole, len(frames), number), strict=True):
            if one is not None and other is not None and not torch.allclose(one, other, rtol=1e-9, atol=1e-9):
                raise ExportError(
                    f"{type(module).__name__}: its output for frame {number} depends on later frames, which a stream "
                    "does not have",
                    hint=_bidirectional(module) or "a step has this frame and what was remembered, nothing else",
                )
        yield [tensor for tensor in now if tensor is not None], memory


def _at(interface: Interface, tensors: Sequence[Tensor], length: int, number: int) -> list[Tensor | None]:
    """The outputs for one frame of a clip; None where the clip has one output for all frames, and this is not the last.

    A list with an output for each frame has more tensors the longer the clip is.
    """
    count = len(interface.output_axes)
    if len(tensors) != count:
        return list(tensors[number * count : (number + 1) * count])
    last = number == length - 1
    return [
        (tensor if last else None)
        if axis is None
        else (tensor.narrow(axis, number, 1) if interface.keeps_time else tensor.select(axis, number))
        for tensor, axis in zip(tensors, interface.output_axes, strict=True)
    ]


def _of_length(data: Inputs, timed: Sequence[str], axis: int, length: int) -> dict[str, Tensor]:
    """The inputs with so many frames."""
    shapes = {name: list(tensor.shape) for name, tensor in data.items()}
    for name in timed:
        shapes[name][axis] = length
    return {name: random(shape, index) for index, (name, shape) in enumerate(shapes.items())}


def _grown(short: Tensor, long: Tensor) -> int | None:
    """The axis along which a longer clip makes an output longer."""
    if short.dim() != long.dim():
        return None
    return next((axis for axis, (a, b) in enumerate(zip(short.shape, long.shape, strict=True)) if a != b), None)


def _reads_the_past(module: nn.Module, clip: Mapping[str, Tensor], timed: Sequence[str], axis: int) -> bool:
    """Whether the first frame changes what is returned for the last one."""
    other = {name: tensor.clone() for name, tensor in clip.items()}
    for name in timed:
        other[name].narrow(axis, 0, 1).add_(0.5)
    results = [copy.deepcopy(module)(**each) for each in (clip, other)]
    tensors = [[leaf for leaf in flatten(result)[0] if isinstance(leaf, Tensor)] for result in results]
    for one, changed in zip(*tensors, strict=True):
        places = [place for place, size in enumerate(one.shape) if size == _FRAMES]
        last = [each.narrow(places[0], _FRAMES - 1, 1) if places else each for each in (one, changed)]
        if not same(*last):
            return True
    return False


def _bidirectional(module: nn.Module) -> str | None:
    """What to do about a layer that runs over the frames backwards as well; None if there is none."""
    for path, child in module.named_modules():
        if isinstance(child, nn.RNNBase) and child.bidirectional:
            return (
                f"{path or 'it'} is a bidirectional {type(child).__name__}: its backward direction starts at the last "
                "frame of a clip; train with bidirectional=False"
            )
    return None


def _no_state(module: nn.Module, depends: bool, scratch: Sequence[StateAttribute]) -> ExportError:
    name = type(module).__name__
    if (hint := _bidirectional(module)) is not None:
        return ExportError(f"{name}: no state that a stream can carry from frame to frame", hint=hint)
    if depends:
        return ExportError(
            f"{name}: forward takes a clip and carries its state from frame to frame in a variable that no submodule "
            "receives and returns",
            hint=_HELP + "; docs/own-module.md has it before and after",
        )
    if numbers := numbers_in(scratch, module):
        return ExportError(f"{name}: its state is no tensor", hint=advice_on_numbers(numbers))
    return ExportError(
        f"{name}: no state: no argument takes a part of the previous result, and no attribute that a call changes is "
        "read by the next",
        hint="a state argument defaults to None and is returned last; --state NAME=POSITION names another; a loop over "
        "frames inside forward needs --shape with the axis of time: x:1x1x3x64x64",
    )
