"""How one module inside another is called, as a function from leaves to leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.exporter.from_module.interface import Interface
from stepcell.exporter.from_module.slots import Inputs, is_state
from stepcell.exporter.from_module.trees import Spec, flatten

__all__ = ["Call", "record_calls"]


@dataclass
class Call:
    """One recorded call: (args, kwargs, own attributes) to (result, own attributes), flattened.

    Attributes:
        attributes: names of the attributes that hold state.
        spec, leaves: what went in.
        results, result_spec: what came out.
        time_axis: of clips of one frame, where the module around it reads clips.
    """

    attributes: tuple[str, ...]
    spec: Spec
    leaves: list[Any]
    results: list[Any] = field(default_factory=list)
    result_spec: Spec = field(default_factory=lambda: flatten(())[1])
    time_axis: int | None = None

    @property
    def tensors(self) -> list[int]:
        """Positions of the tensors that data and states can be."""
        return [position for position, leaf in enumerate(self.leaves) if is_state(leaf)]

    def frame(self, tensor: Tensor) -> Tensor:
        """A tensor as a cell takes it: features (N, F) as maps of one pixel, a clip as its one frame."""
        if tensor.dim() == 5 and self.time_axis is not None and tensor.shape[self.time_axis] == 1:
            return tensor.squeeze(self.time_axis)
        return tensor[:, :, None, None] if tensor.dim() == 2 else tensor

    def evaluate(self, module: nn.Module, leaves: Sequence[Any]) -> list[Any]:
        """Call `module` in the same way with other tensors."""
        args, kwargs, values = self.spec.unflatten(list(leaves))
        for name, value in values.items():
            setattr(module, name, value)
        with torch.no_grad():
            result = module(*args, **kwargs)
        return flatten((result, {name: getattr(module, name) for name in self.attributes}))[0]

    def random(self, seed: int, *, small: bool) -> list[Any]:
        """The leaves with random tensors of the same shapes; `small` cuts maps to at most 7x6."""
        rng = torch.Generator().manual_seed(seed)

        def draw(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not is_state(leaf):
                return leaf
            shape = list(leaf.shape)
            if small and leaf.dim() in (4, 5):
                shape[-2:] = min(shape[-2], 7), min(shape[-1], 6)
            return 2 * torch.rand(shape, generator=rng, dtype=torch.float64) - 1

        return [draw(leaf) for leaf in self.leaves]


def record_calls(module: nn.Module, interface: Interface, inputs: Inputs, memory: Sequence[Any]) -> dict[str, Call]:
    """The call of every submodule in one step of `module`, by path."""
    calls: dict[str, Call] = {}
    for path, child in module.named_modules():
        own = tuple(slot.name for slot in interface.slots if slot.path == path)

        def enter(child: nn.Module, args: Any, kwargs: Any, path: str = path, own: tuple[str, ...] = own) -> None:
            if path not in calls:
                leaves, spec = flatten((args, kwargs, {name: getattr(child, name) for name in own}))
                calls[path] = Call(own, spec, leaves, time_axis=interface.time_axis if interface.timed else None)

        def leave(child: nn.Module, _: Any, result: Any, path: str = path, own: tuple[str, ...] = own) -> None:
            if not calls[path].results:
                values = {name: getattr(child, name) for name in own}
                calls[path].results, calls[path].result_spec = flatten((result, values))

        child.register_forward_pre_hook(enter, with_kwargs=True)
        child.register_forward_hook(leave)
    with torch.no_grad():
        interface.step(module, inputs, memory)
    return calls
