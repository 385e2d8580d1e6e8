"""Optimisation profiles of an engine: minimum, optimum and maximum shape of every input and state.

The user gives the shapes of data inputs only. Those of states are derived by the expressions in the contract.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stepcell.contract import Spec, StateSpec, StepContract, TensorSpec
from stepcell.dims import bind, resolve
from stepcell.errors import ContractError, InputError, UsageError
from stepcell.runtime.engine.options import BuildOptions
from stepcell.shapes import format_shapes

__all__ = ["Profile", "data_shapes", "derive_profiles", "engine_profiles"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Profile(msgspec.Struct, frozen=True):
    """Minimum shape, the shape that the engine is tuned for, and maximum shape."""

    min: Shape
    opt: Shape
    max: Shape

    @property
    def is_fixed(self) -> bool:
        return self.min == self.opt == self.max

    def __contains__(self, shape: object) -> bool:
        if not isinstance(shape, tuple) or len(shape) != len(self.min):
            return False
        return all(low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True))


def derive_profiles(contract: StepContract, options: BuildOptions) -> dict[str, Profile]:
    """Derive the profile of every graph input: data inputs, then states by input name.

    A missing level is copied from another: `opt` from `max`, else from `min`; `min` and `max` from `opt`. Without
    any shapes, all three are the sizes at export.

    Raises:
        UsageError: an unknown input, a size that the model cannot take, a state's shape that differs from the
            derived one, sizes out of order, or an input without a size.
    """
    given = {"--minShapes": options.min_shapes, "--optShapes": options.opt_shapes, "--maxShapes": options.max_shapes}
    opt = options.opt_shapes or options.max_shapes or options.min_shapes
    levels = []
    for shapes in (options.min_shapes or opt, opt, options.max_shapes or opt):
        option = next((name for name, value in given.items() if shapes and value is shapes), "--optShapes")
        levels.append(_all_shapes(contract, option, shapes or _example_shapes(contract)))
    profiles = {name: Profile(*(level[name] for level in levels)) for name in levels[0]}
    for name, profile in profiles.items():
        if profile.opt not in profile:
            raise UsageError(
                f"{name}: shapes must be in order, min <= opt <= max, got {profile.min}, {profile.opt}, {profile.max}"
            )
    return profiles


def engine_profiles(profiles: Mapping[str, Profile], inputs: Mapping[str, Spec]) -> dict[str, Profile]:
    """Profiles of all inputs of an engine. Additional inputs of a state have the state's profile.

    Args:
        profiles: size ranges of the contract's inputs.
        inputs: inputs of the engine, by name.
    """
    return {name: profiles[spec.input if isinstance(spec, StateSpec) else name] for name, spec in inputs.items()}


def data_shapes(contract: StepContract, profiles: Mapping[str, Profile]) -> str:
    """The sizes of the data inputs as text: `x:1x3x64x64` or `x:1x3x64x64 to x:4x3x64x64`."""
    smallest = format_shapes({spec.name: profiles[spec.name].min for spec in contract.inputs})
    largest = format_shapes({spec.name: profiles[spec.name].max for spec in contract.inputs})
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _example_shapes(contract: StepContract) -> dict[str, Shape]:
    try:
        return {spec.name: resolve(spec.shape, contract.example) for spec in contract.inputs}
    except ContractError as error:
        raise UsageError(
            f"the model has dynamic sizes and no example sizes: {error.message}",
            hint="pass --optShapes, such as x:1x3x256x256",
        ) from error


def _all_shapes(contract: StepContract, option: str, shapes: Shapes) -> dict[str, Shape]:
    """Shapes of all data inputs and states at one level, derived from the given ones."""
    known = [spec.name for spec in contract.inputs] + [state.input for state in contract.states]
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise UsageError(f"{option}: the model has no input {unknown[0]!r} (it has {', '.join(known)})")
    try:
        symbols = bind((spec.name, spec.shape, shapes[spec.name]) for spec in contract.inputs if spec.name in shapes)
        full = {
            spec.name: shapes.get(spec.name) or _follow(contract, spec, symbols, option) for spec in contract.inputs
        }
        symbols = contract.bind(full)
        derived = contract.state_shapes(symbols)
    except (InputError, ContractError) as error:
        raise UsageError(f"{option}: {error.message}", hint=error.hint) from error
    for state in contract.states:
        shape = shapes.get(state.input, derived[state.name])
        if shape != derived[state.name]:
            raise UsageError(
                f"{option}: {state.input}: the inputs determine {derived[state.name]}, got {shape}",
                hint="omit states: their shapes are derived",
            )
        full[state.input] = shape
    return full


def _follow(contract: StepContract, spec: TensorSpec, symbols: Mapping[str, int], option: str) -> Shape:
    """Shape of an input that was not given, if the other inputs determine it."""
    try:
        return resolve(spec.shape, symbols)
    except ContractError as error:
        sizes = {**dict.fromkeys(contract.symbols, 1), **contract.example}
        example = format_shapes({spec.name: resolve(spec.shape, sizes)})
        raise UsageError(f"{option}: no shape for input {spec.name!r}", hint=f"add it, such as {example}") from error
