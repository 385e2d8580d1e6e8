"""A canonical cell behind the call of the module that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepcell.exporter.from_module.calls import Call
from stepcell.exporter.from_module.identify import as_map
from stepcell.exporter.from_module.registry import Cell
from stepcell.exporter.from_module.trees import flatten

__all__ = ["AdoptedCell"]

_PLAIN = (bool, int, float, str, tuple, type(None))


class AdoptedCell(nn.Module):
    """A canonical cell that is called as the module it stands for.

    Attributes:
        wide_in: states set here go before those in the call: they are in the state dtype, while the
            module around the cell hands on everything in the compute dtype.
        wide_out: the new states of the last call, in the state dtype.
        tensors_in, tensors_out: of the last call, by role; to see which state of the model is whose.
    """

    def __init__(
        self,
        original: nn.Module,
        canonical: Cell,
        call: Call,
        roles: Mapping[str, int],
        results: tuple[str | None, ...],
    ) -> None:
        super().__init__()
        # A size that the code around the cell may read, such as hidden_size.
        self.__dict__.update({k: v for k, v in vars(original).items() if isinstance(v, _PLAIN) and k != "training"})
        for name in call.attributes:
            setattr(self, name, getattr(original, name))
        self.canonical = canonical
        self.attributes, self.spec, self.result_spec = call.attributes, call.spec, call.result_spec
        self.roles, self.results = dict(roles), results
        self.time_axis = call.time_axis
        self.clips = tuple(isinstance(leaf, Tensor) and leaf.dim() == 5 for leaf in call.results)
        self.wide_in: dict[str, Tensor] = {}
        self.wide_out: dict[str, Tensor] = {}
        self.tensors_in: dict[str, Tensor] = {}
        self.tensors_out: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attributes = {name: getattr(self, name) for name in self.attributes}
        leaves, spec = flatten((args, kwargs, attributes))
        if spec != self.spec:
            raise RuntimeError("the cell is called in another way than when it was adopted")
        self.tensors_in = {role: leaves[position] for role, position in self.roles.items()}
        x = self.tensors_in["x"]
        if x.dim() == 5 and self.time_axis is not None:
            x = x.squeeze(self.time_axis)
        given = [self.wide_in.get(role, self.tensors_in[role]) for role in self.canonical.states]
        y, *states = self.canonical(*(as_map(tensor) for tensor in (x, *given)))
        states = [state.flatten(1) if x.dim() == 2 else state for state in states]
        self.wide_out = dict(zip(self.canonical.states, states, strict=True))
        self.tensors_out = {name: state.to(x.dtype) for name, state in self.wide_out.items()}
        self.tensors_out["h"] = y.flatten(1) if x.dim() == 2 else y
        new = [self._given_back(role, clip) for role, clip in zip(self.results, self.clips, strict=True)]
        result, attributes = self.result_spec.unflatten(new)
        for name, value in attributes.items():
            setattr(self, name, value)
        return result

    def _given_back(self, role: str | None, clip: bool) -> Tensor | None:
        if role is None:
            return None
        state = self.tensors_out[role]
        return state if not clip or self.time_axis is None else state.unsqueeze(self.time_axis)
