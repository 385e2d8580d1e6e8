"""Recorded run: steps a torch module in float32 and float64 and measures how they and the states differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepcell.errors import StepcellError

__all__ = ["Run", "Step", "call_in_order", "randomise", "record"]

Tensors = dict[str, Tensor]
# (model, inputs of one step, states) -> (outputs, new states), all by name
Step = Callable[[nn.Module, Tensors, Tensors], tuple[Tensors, Tensors]]

SMALLEST_TOLERANCE = 2e-5
STATE_EFFECT = 1e-3  # least change of the outputs if the states are dropped
NEGLIGIBLE = 1e-4  # change of the outputs below which a perturbed tensor is reported


@dataclass(frozen=True)
class Run:
    """Inputs of a recorded run.

    Attributes:
        inputs: by name; those in `moving` have a leading time axis, the others are constant.
        initial: states before the first step.
        resets: by step, a mask over the batch applied to the states before it: 1 keeps, 0 clears.
    """

    inputs: Tensors
    moving: frozenset[str]
    initial: Tensors
    resets: Mapping[int, Sequence[int]]

    @property
    def steps(self) -> int:
        return min(len(self.inputs[name]) for name in self.moving)

    def __call__(
        self, model: nn.Module, step: Step, *, double: bool = False, drop: Sequence[int] = ()
    ) -> tuple[Tensors, Tensors]:
        """Outputs with a leading time axis, and the states after the last step.

        Args:
            double: compute in float64.
            drop: steps before which all states are set to zero.
        """
        model = copy.deepcopy(model).to(torch.float64 if double else torch.float32)
        inputs, states = self.inputs, self.initial
        if double:
            inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
            states = {name: t.double() for name, t in states.items()}
        outputs: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for index in range(self.steps):
                if index in self.resets:
                    mask = torch.tensor(self.resets[index])
                    states = {n: t * mask.to(t.dtype).view(-1, *[1] * (t.dim() - 1)) for n, t in states.items()}
                if index in drop:
                    states = {name: torch.zeros_like(tensor) for name, tensor in states.items()}
                frame = {name: t[index] if name in self.moving else t for name, t in inputs.items()}
                result, states = step(model, frame, states)
                for name, tensor in result.items():
                    outputs.setdefault(name, []).append(tensor)
        return {name: torch.stack(tensors) for name, tensors in outputs.items()}, states


def call_in_order(model: nn.Module, inputs: Tensors, states: Tensors) -> tuple[Tensors, Tensors]:
    """Default step: `y, *new_states = model(*inputs, *states)`."""
    y, *new_states = model(*inputs.values(), *states.values())
    return {"y": y}, dict(zip(states, new_states, strict=True))


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all parameters and the statistics of norms at random, so that no tensor is zero or one."""

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        norms = [module for module in model.modules() if "Norm" in type(module).__name__]
        scales = {id(getattr(module, "weight", None)) for module in norms}
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and len(parameter) > 1 else 25
            normal(parameter, 1.0 if id(parameter) in scales else 0.0, fan_in**-0.5)
        for norm in norms:
            mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                normal(mean, 0.0, 0.2)
                variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))


def record(model: nn.Module, run: Run, step: Step) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Run the model in float32 and in float64, with the same weights.

    Returns:
        Arrays of `io.npz`, and the measured fields of `case.json`.

    Raises:
        StepcellError: an output is not finite, or the states have no effect on the outputs.
    """
    outputs, finals = run(model, step)
    wide_outputs, wide_finals = run(model, step, double=True)
    named = {**outputs, **{f"final_{name}": tensor for name, tensor in finals.items()}}
    wide = {**wide_outputs, **{f"final_{name}": tensor for name, tensor in wide_finals.items()}}
    if infinite := [name for name, tensor in wide.items() if not torch.isfinite(tensor).all()]:
        raise StepcellError(f"{infinite[0]}: is not finite; choose another --seed")
    dropped, _ = run(model, step, drop=range(max(run.steps - 2, 0), run.steps))
    effect = {name: _distance(outputs[name], dropped[name]) for name in outputs}
    if max(effect.values()) < STATE_EFFECT:
        raise StepcellError(
            f"the states change the outputs by {max(effect.values()):.1e} only",
            hint="the step function must pass the states to the model and return the new ones",
        )
    unused, negligible = _unused_tensors(model, run, step, outputs)
    differences = {name: _distance(tensor, wide[name]) for name, tensor in named.items()}
    arrays = {name: tensor.numpy() for name, tensor in run.inputs.items()}
    arrays |= {f"init_{name}": tensor.numpy() for name, tensor in run.initial.items() if bool(tensor.any())}
    for name, tensor in named.items():
        arrays |= {name: tensor.numpy(), f"{name}_f64": wide[name].numpy()}
    return arrays, {
        "suggested_atol_float32": max(SMALLEST_TOLERANCE, 10 * max(differences.values())),
        "float32_vs_float64_max_abs": differences,
        "unused_tensors": unused,
        "negligible_tensors": negligible,
        "stats": {
            "max_change_of_last_two_frames_if_state_dropped": effect,
            "std": {name: float(array.std()) for name, array in arrays.items() if not name.endswith("_f64")},
        },
    }


def _unused_tensors(model: nn.Module, run: Run, step: Step, outputs: Tensors) -> tuple[list[str], dict[str, float]]:
    """Tensors of the state_dict without an effect on the outputs, and those with a negligible one."""
    unused, negligible = [], {}
    for name, tensor in model.state_dict().items():
        changed = copy.deepcopy(model)
        changed.state_dict()[name].copy_(tensor + 1 if not tensor.is_floating_point() else tensor * 1.1 + 0.05)
        effect = max(_distance(outputs[key], value) for key, value in run(changed, step)[0].items())
        if effect == 0:
            unused.append(name)
        elif effect < NEGLIGIBLE:
            negligible[name] = effect
    return unused, negligible


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
