"""Conversion of a user's own module to a step model: finds its states, replaces what cannot be traced, compares."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.dims import bind, resolve
from stepcell.errors import ExportError, StepcellError, UsageError
from stepcell.exporter.from_module.attributes import Inputs, Starts, demote_buffers, is_state, random, state_leaves
from stepcell.exporter.from_module.find_states import Interface, find_interface
from stepcell.exporter.from_module.float64 import Float64
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.from_module.replacements import replace_modules
from stepcell.exporter.from_module.sequences import remove_time_axis
from stepcell.exporter.from_module.specs import fill_in_specs
from stepcell.exporter.from_module.trees import flatten, map_leaves
from stepcell.exporter.parity import OWN_RUNS, TOLERANCE, Arrays, CheckClip, Run, check_equal, nudged

__all__ = ["lift_states"]

STEPS = 32


def lift_states(
    module: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    *,
    dynamic: Sequence[str] = (),
    returned: Mapping[str, int] | None = None,
) -> LiftedModel:
    """Make a step model of any module that keeps state, or takes and returns it.

    `export_onnx` of the result recognises the recurrent cells in the traced graph.

    Args:
        module: it is not changed; a copy in eval mode is used.
        shapes: example shape of every data input, by the name of `forward`'s argument.
        dynamic: the sizes out of batch, height, width that are not fixed.
        returned: state arguments that do not follow the rule (default None, returned last), each
            with its position in what `forward` returns. One that has a shape too starts as zeros.

    Returns:
        A step model in float32, equal to `module` over 32 steps in float64.

    Raises:
        UsageError: a name that `forward` does not take.
        ExportError: the states cannot be lifted; the message says where and why.
        ParityError: the step model differs from the module.
    """
    try:
        with Float64(), torch.no_grad():
            model = _lifted(module, shapes, dynamic, dict(returned or {}))
    except StepcellError:
        raise
    except Exception as error:  # the user's code may raise anything, at any of many calls
        raise ExportError(f"{type(module).__name__}: cannot be exported: {type(error).__name__}: {error}") from error
    return model.float().eval()


def _lifted(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], dynamic: Sequence[str], returned: Mapping[str, int]
) -> LiftedModel:
    original = copy.deepcopy(module).double().eval()
    parameters = inspect.signature(original.forward).parameters
    if unknown := [name for name in (*shapes, *returned) if name not in parameters]:
        raise UsageError(f"{unknown[0]}: forward has no such argument", hint=f"it takes {', '.join(parameters)}")
    data: Inputs = {name: random(shape, i) for i, (name, shape) in enumerate(shapes.items()) if name not in returned}
    starts: dict[str, Tensor | None] = {name: torch.zeros(tuple(shapes[name])) for name in returned if name in shapes}
    # A required argument that is no data may still accept None for "no state yet".
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    starts |= dict.fromkeys(name for name in required if name not in data and name not in starts)
    interface = find_interface(original, data, returned, starts)
    interface, data = remove_time_axis(original, interface, data, starts)
    warm = replace_modules(copy.deepcopy(original))
    _, memory = interface.first(warm, data, starts)
    _check_start(original, warm, interface, data, starts, memory)
    demote_buffers(warm, (*interface.attributes, *interface.scratch))
    model = LiftedModel(warm, interface, list(data), memory)
    fill_in_specs(model, original, data, starts, dynamic)
    _check_same(original, model, data, starts)
    if model.symbols:  # what holds at one size need not hold at another
        _check_same(original, model, *_resized(model, data, starts))
    return model


def _resized(model: LiftedModel, data: Inputs, starts: Starts) -> tuple[Inputs, Starts]:
    """Inputs and given states at other sizes, where sizes are dynamic."""
    sizes = bind((spec.name, spec.shape, data[spec.name].shape) for spec in model.inputs)
    step = max(spec.pad_multiple for spec in model.inputs)
    sizes = {symbol: size + (2 if symbol == "batch" else 3 * step) for symbol, size in sizes.items()}
    frames = {spec.name: random(resolve(spec.shape, sizes), 0) for spec in model.inputs}
    shapes = {
        model.interface.places[tensor.place]: resolve(state.shape, sizes)
        for tensor, state in zip(model.tensors, model.states, strict=True)
    }
    begin = {
        argument.name: torch.zeros(shapes[argument]) if starts[argument.name] is not None else None
        for argument in model.interface.arguments
        if argument.name in starts
    }
    return frames, begin


def _check_start(
    original: nn.Module, warm: nn.Module, interface: Interface, data: Inputs, starts: Starts, memory: Sequence[Any]
) -> None:
    """A fresh module must compute the same as one with states of zeros, which is how every run starts."""
    zeros = map_leaves(lambda leaf: torch.zeros_like(leaf) if is_state(leaf) else leaf, list(memory))
    expected = interface.first(copy.deepcopy(original), data, starts)
    try:
        got = interface.step(copy.deepcopy(warm), data, zeros)
    except Exception as error:  # the user's code may raise anything
        raise ExportError(f"forward fails with states of zeros: {type(error).__name__}: {error}") from error
    for one, other in zip(flatten(expected)[0], flatten(got)[0], strict=True):
        if isinstance(one, Tensor) and not _is_close(other, one):
            places = ", ".join(map(str, interface.places))
            raise ExportError(
                f"{places}: the first call computes something else than with states of zeros",
                hint="a state that does not start from zeros cannot be exported: store its difference to the start; an "
                "argument that is data needs its shape in --shape",
            )


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of float64; integers and booleans in all elements but one, which it may decide."""
    if one.shape == other.shape and not other.is_floating_point():
        return int((one != other).sum()) <= 1
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-10 * (1 + other.abs().max()))


def _check_same(original: nn.Module, model: LiftedModel, data: Inputs, starts: Starts) -> None:
    """Compare the step model with the original module in float64, each with its own state.

    Raises:
        ParityError: they differ.
    """
    interface = model.interface
    names = [*(spec.name for spec in model.outputs), *(state.name for state in model.states)]
    _, memory = interface.first(copy.deepcopy(original), data, starts)
    zeros = [torch.zeros(leaf.shape) for leaf in state_leaves(memory)]

    def frames() -> Iterator[Arrays]:
        for step in range(STEPS):
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
            return _arrays(names, [*interface.outputs(result), *state_leaves(kept)])

        return run

    def lifted_run(_: CheckClip) -> Run:
        states = list(zeros)

        def run(frame: Arrays) -> Arrays:
            results = model(*(torch.from_numpy(array) for array in frame.values()), *states)
            states[:] = results[len(model.outputs) :]
            return _arrays(names, results)

        return run

    check_equal(
        original_run,
        lifted_run,
        [CheckClip("random frames", STEPS, frames, {})],
        TOLERANCE["float64", "float64"],
        own_runs=lambda: [nudged(original_run, "float64", seed) for seed in range(1, OWN_RUNS + 1)],
        subject="the original module",
        hint="the module remembers something that is no tensor attribute and no returned state",
    )


def _arrays(names: Sequence[str], tensors: Sequence[Tensor]) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in zip(names, tensors, strict=True)}
