"""Conversion of a user's own module to a step model: finds its states, replaces what cannot be traced, compares."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stepcell.dims import bind, resolve
from stepcell.errors import ExportError, StepcellError, UsageError
from stepcell.exporter.floats import Floats, is_float
from stepcell.exporter.from_module.attributes import (
    Inputs,
    Starts,
    cast_attributes,
    demote_buffers,
    detached_copy,
    random,
)
from stepcell.exporter.from_module.find_states import find_interface
from stepcell.exporter.from_module.first_step import start_as
from stepcell.exporter.from_module.frame_loops import check_directions, find_in_loop
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.from_module.replacements import replace_modules
from stepcell.exporter.from_module.same import check_same
from stepcell.exporter.from_module.sequences import remove_time_axis
from stepcell.exporter.from_module.specs import fill_in_specs
from stepcell.exporter.from_module.wrappers import plain_module

__all__ = ["lift_states"]


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
        # `torch.compile` on parts and functions of the module is skipped
        with Floats(torch.float64), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model = _lifted(plain_module(module), shapes, dynamic, dict(returned or {}))
    except StepcellError:
        raise
    except Exception as error:  # the user's code may raise anything, at any of many calls
        raise ExportError(f"{type(module).__name__}: cannot be exported: {type(error).__name__}: {error}") from error
    return model.float().eval()


def _lifted(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], dynamic: Sequence[str], returned: Mapping[str, int]
) -> LiftedModel:
    original = detached_copy(module).double().eval()
    cast_attributes(original, lambda tensor: tensor.double() if is_float(tensor) else tensor)
    parameters = inspect.signature(original.forward).parameters
    if unknown := [name for name in (*shapes, *returned) if name not in parameters]:
        raise UsageError(f"{unknown[0]}: forward has no such argument", hint=f"it takes {', '.join(parameters)}")
    data: Inputs = {name: random(shape, i) for i, (name, shape) in enumerate(shapes.items()) if name not in returned}
    starts: dict[str, Tensor | None] = {name: torch.zeros(tuple(shapes[name])) for name in returned if name in shapes}
    # A required argument that is no data may still accept None for "no state yet".
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    starts |= dict.fromkeys(name for name in required if name not in data and name not in starts)
    interface = find_interface(original, data, returned, starts)
    if interface.places:
        interface, data = remove_time_axis(original, interface, data, starts)
    else:
        interface, data = find_in_loop(original, data, interface.scratch)
    check_directions(original, interface, data, starts)
    fresh = replace_modules(copy.deepcopy(original))
    warm = copy.deepcopy(fresh)
    _, memory = interface.first(warm, data, starts)
    demote_buffers(warm, interface.changing)
    model = LiftedModel(warm, interface, list(data), memory, starts)
    fill_in_specs(model, original, data, starts, dynamic)
    start_as(model, original, fresh, data, memory)
    check_same(original, model, data, starts)
    if model.symbols:  # what holds at one size need not hold at another
        check_same(original, model, *_resized(model, data, starts))
    return model


def _resized(model: LiftedModel, data: Inputs, starts: Starts) -> tuple[Inputs, Starts]:
    """Inputs and given states at other sizes, where sizes are dynamic."""
    sizes = bind((spec.name, spec.shape, data[spec.name].shape) for spec in model.inputs)
    step = max(spec.pad_multiple for spec in model.inputs)
    sizes = {symbol: size + (2 if symbol == "batch" else 3 * step) for symbol, size in sizes.items()}
    frames = {spec.name: random(resolve(spec.shape, sizes), 0) for spec in model.inputs}
    shapes = {
        model.interface.places[tensor.place]: resolve(state.shape, sizes)
        for tensor, state in zip(model.tensors, model.plain_states, strict=True)
    }
    begin = {
        argument.name: torch.zeros(shapes[argument]) if starts[argument.name] is not None else None
        for argument in model.interface.arguments
        if argument.name in starts
    }
    return frames, begin
