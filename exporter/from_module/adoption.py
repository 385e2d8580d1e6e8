"""The way of a user's own module to a step model: find its states, replace its cells, compare."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepcell.dims import bind, resolve
from stepcell.errors import ExportError, ParityError, StepcellError, UsageError
from stepcell.exporter.from_module.calls import record_calls
from stepcell.exporter.from_module.cells import replace_cells
from stepcell.exporter.from_module.describe import describe
from stepcell.exporter.from_module.identify import close
from stepcell.exporter.from_module.interface import Interface, find_interface
from stepcell.exporter.from_module.model import AdoptedModel
from stepcell.exporter.from_module.sequences import take_time
from stepcell.exporter.from_module.slots import Inputs, Starts, demote_buffers, is_state, random, state_leaves
from stepcell.exporter.from_module.trees import flatten, map_leaves

__all__ = ["adopt"]

STEPS = 32
# The adopted module computes the same sums in another order, in float64.
TOLERANCE = 1e-9
LAST_DIGIT = 2.0**-51  # twice the rounding of float64
AMPLIFIED = 8.0  # two ways of rounding meet in different places


def adopt(
    module: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    *,
    dynamic: Sequence[str] = (),
    returned: Mapping[str, int] | None = None,
) -> AdoptedModel:
    """Make a step model of any module that keeps state or takes and returns it.

    Args:
        module: left as it is; a copy in eval mode is adopted.
        shapes: example shape of every data input, by the name of `forward`'s argument.
        dynamic: of batch, height, width: sizes that shall not be fixed.
        returned: state arguments that do not follow the rule (default None, returned last), each
            with its position in what `forward` returns. One that has a shape too starts as zeros.

    Returns:
        A step model in float32, equal to `module` over 32 steps in float64.

    Raises:
        UsageError: a name that `forward` does not take.
        ExportError: the module cannot be adopted; says where and why.
        ParityError: the adopted module differs from the original one.
    """
    try:
        with _float64(), torch.no_grad():
            model = _adopted(module, shapes, dynamic, dict(returned or {}))
    except StepcellError:
        raise
    except Exception as error:  # the user's code may raise anything, at any of many calls
        raise ExportError(f"{type(module).__name__}: cannot be adopted: {type(error).__name__}: {error}") from error
    return model.float().eval()


def _adopted(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], dynamic: Sequence[str], returned: Mapping[str, int]
) -> AdoptedModel:
    original = copy.deepcopy(module).double().eval()
    parameters = inspect.signature(original.forward).parameters
    if unknown := [name for name in (*shapes, *returned) if name not in parameters]:
        raise UsageError(f"{unknown[0]}: forward has no such argument", hint=f"it takes {', '.join(parameters)}")
    data: Inputs = {name: random(shape, i) for i, (name, shape) in enumerate(shapes.items()) if name not in returned}
    starts: dict[str, Tensor | None] = {name: torch.zeros(tuple(shapes[name])) for name in returned if name in shapes}
    # What must be given and is no data may still take None for "no state yet".
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    starts |= dict.fromkeys(name for name in required if name not in data and name not in starts)
    interface = find_interface(original, data, returned, starts)
    interface, data = take_time(original, interface, data, starts)
    warm = copy.deepcopy(original)
    _, memory = interface.first(warm, data, starts)
    _check_start(original, warm, interface, data, starts, memory)
    demote_buffers(warm, (*interface.slots, *interface.scratch))
    calls = record_calls(copy.deepcopy(warm), interface, data, memory)
    adopted, found = replace_cells(warm, calls)
    # What a replaced cell noted for itself went with it.
    interface = replace(interface, scratch=tuple(slot for slot in interface.scratch if slot.exists(adopted)))
    model = AdoptedModel(adopted, interface, list(data), memory)
    model.find_owners(list(data.values()), [torch.rand(leaf.shape) for leaf in state_leaves(memory)])
    describe(model, found, original, data, starts, dynamic)
    _check_same(original, model, data, starts)
    if model.symbols:  # what holds at one size need not hold at another
        _check_same(original, model, *_resized(model, data, starts))
    return model


def _resized(model: AdoptedModel, data: Inputs, starts: Starts) -> tuple[Inputs, Starts]:
    """Inputs and given states at other sizes, where sizes are dynamic."""
    sizes: dict[str, int] = {}
    for spec in model.inputs:
        sizes = bind(spec.name, spec.shape, data[spec.name].shape, sizes)
    step = max(spec.pad_multiple for spec in model.inputs)
    sizes = {symbol: size + (2 if symbol == "batch" else 3 * step) for symbol, size in sizes.items()}
    frames = {spec.name: random(resolve(spec.shape, sizes), 0) for spec in model.inputs}
    shapes = {
        model.interface.places[lifted.place]: resolve(state.shape, sizes)
        for lifted, state in zip(model.layout, model.states, strict=True)
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
    """The contract knows one start, zeros: a fresh module must compute the same as one with zero states."""
    zeros = map_leaves(lambda leaf: torch.zeros_like(leaf) if is_state(leaf) else leaf, list(memory))
    expected = interface.first(copy.deepcopy(original), data, starts)
    try:
        got = interface.step(copy.deepcopy(warm), data, zeros)
    except Exception as error:  # the user's code may raise anything
        raise ExportError(f"forward fails with states of zeros: {type(error).__name__}: {error}") from error
    for one, other in zip(flatten(expected)[0], flatten(got)[0], strict=True):
        if isinstance(one, Tensor) and not close(other, one):
            places = ", ".join(map(str, interface.places))
            raise ExportError(
                f"{places}: the first call computes something else than with states of zeros",
                hint="a state that starts from other values cannot be exported: store its difference to them; an "
                "argument that is data gets a shape in --shape",
            )


def _check_same(original: nn.Module, model: AdoptedModel, data: Inputs, starts: Starts) -> None:
    """The adopted module against the original one over STEPS steps in float64, each with its own state.

    A module may amplify rounding from step to step; what it makes of inputs that are off by a last
    digit bounds what the order of sums may do.

    Raises:
        ParityError: they differ.
    """
    interface = model.interface
    expected = _Run(interface, copy.deepcopy(original), starts)
    shaken = _Run(interface, copy.deepcopy(original), starts)
    _, memory = interface.first(copy.deepcopy(original), data, starts)
    states: Sequence[Tensor] = [torch.zeros(state.shape) for state in state_leaves(memory)]
    names = [*(spec.name for spec in model.outputs), *(state.name for state in model.states)]
    reached = 0.0
    for step in range(STEPS):
        frame = {name: random(tensor.shape, 100 + step) for name, tensor in data.items()}
        got = model(*frame.values(), *states)
        states = got[len(model.outputs) :]
        truth = expected.step(frame)
        moved = shaken.step({name: tensor * (1 + LAST_DIGIT) for name, tensor in frame.items()})
        reached = max(reached, *(float((one - other).abs().max()) for one, other in zip(truth, moved, strict=True)))
        for name, one, other in zip(names, truth, got, strict=True):
            error = float((one - other).abs().max())
            if not error <= max(TOLERANCE * max(1.0, float(one.abs().max())), AMPLIFIED * reached):
                raise ParityError(
                    f"{name}: the adopted module differs from the original by {error:.3g} at step {step} of {STEPS} "
                    "in float64",
                    hint="the module remembers something that is no tensor attribute and no returned state",
                )


class _Run:
    """The original module, step after step."""

    def __init__(self, interface: Interface, module: nn.Module, starts: Starts) -> None:
        self.interface, self.module, self.starts = interface, module, starts
        self.memory: list[Any] | None = None

    def step(self, frame: Inputs) -> list[Tensor]:
        """Outputs and new states."""
        if self.memory is None:
            result, self.memory = self.interface.first(self.module, frame, self.starts)
        else:
            result, self.memory = self.interface.step(self.module, frame, self.memory)
        return [*self.interface.outputs(result), *state_leaves(self.memory)]


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """States that a module makes itself (`torch.zeros(...)`) are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
