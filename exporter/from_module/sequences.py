"""Time axis of modules that take sequences, which are stepped with sequences of one frame."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from stepcell.errors import ExportError
from stepcell.exporter.from_module.attributes import Inputs, Starts, random, state_leaves
from stepcell.exporter.from_module.find_states import Interface

__all__ = ["remove_time_axis"]

_FRAMES = 5  # axes of (time, batch, channels, height, width), or batch first


def remove_time_axis(module: nn.Module, interface: Interface, data: Inputs, starts: Starts) -> tuple[Interface, Inputs]:
    """Remove the time axis of inputs with five axes; the interface adds it back when it calls the module.

    The states tell which of the first two axes is time: their sizes depend on the batch, but not on time.

    Raises:
        ExportError: the sequence is longer than one frame, or no axis behaves like time.
    """
    timed = [name for name, tensor in data.items() if tensor.dim() == _FRAMES]
    if not timed:
        return interface, data
    if any(1 not in data[name].shape[:2] for name in timed):
        raise ExportError(
            f"--shape {timed[0]}: five axes are a sequence, and a step takes one frame: expected a length of 1, "
            f"got {tuple(data[timed[0]].shape)}"
        )

    def shapes(axis: int, length: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        longer = {}
        for name, tensor in data.items():
            sizes = list(tensor.shape)
            if name in timed:
                sizes[axis] = length
            longer[name] = random(sizes, 0)
        result, memory = interface.first(copy.deepcopy(module), longer, starts)
        return [tuple(t.shape) for t in interface.outputs(result)], [tuple(t.shape) for t in state_leaves(memory)]

    found = []
    for axis in (0, 1):
        try:
            short, long = shapes(axis, 2), shapes(axis, 3)
        except Exception:  # an axis of fixed size is not time
            continue
        if short[1] == long[1] and all(data[name].shape[axis] == 1 for name in timed):
            grown = tuple(
                next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
                for one, other in zip(short[0], long[0], strict=True)
            )
            found.append((axis, grown))
    if len(found) != 1:
        raise ExportError(f"--shape {timed[0]}: of its first two axes {len(found)} behave like time, expected one")
    axis, grown = found[0]
    frames = {name: tensor.squeeze(axis) if name in timed else tensor for name, tensor in data.items()}
    return replace(interface, timed=tuple(timed), time_axis=axis, output_axes=grown), frames
