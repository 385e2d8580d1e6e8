"""Contract of the file to export: sizes and dtypes, from the specs of a model and the user's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor, nn

from stepcell.contract import DType, InitialValue, StateSpec, StepContract, TensorSpec
from stepcell.dims import bind, resolve, substitute, symbols_of
from stepcell.errors import ExportError, InputError, UsageError
from stepcell.models.step import StepModule, cell_specs
from stepcell.nv12 import nv12_of
from stepcell.pixels import completed, map_layout

__all__ = ["TORCH_DTYPES", "contract_for", "example_tensors", "sizes_for_check", "sizes_for_trace"]

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "bool": torch.bool,
}
_DEFAULT_SIZES = {"batch": 1}
_DEFAULT_SIZE = 256
_SMALLEST = 8
# Two sizes for height, width and others to compare at: different from one another also when both are rounded up to 32.
_CHECK_SIZES = ((32, 33), (40, 30), (36, 37), (44, 31))


def contract_for(
    model: StepModule,
    *,
    precision: str,
    state_dtype: str,
    shapes: Mapping[str, Sequence[int]],
    dynamic: Sequence[str],
) -> StepContract:
    """The contract of the file to be written.

    A symbol that `shapes` gives a value is fixed unless `dynamic` names it; every other symbol
    stays dynamic.

    Raises:
        UsageError: a shape does not fit the model, or `dynamic` names something else than a symbol.
        ExportError: `initial` names something else than a state.
        ContractError: a value of `initial` does not fit its state.
    """
    by_name = {spec.name: spec for spec in model.inputs}
    for name in shapes:
        if name not in by_name:
            raise UsageError(f"--shape {name}: the model has no such input", hint=f"inputs: {', '.join(by_name)}")
    try:
        symbols = bind((f"--shape {name}", by_name[name].shape, shape) for name, shape in shapes.items())
    except InputError as error:
        raise UsageError(error.message, hint=error.hint) from error
    known = symbols_of(dim for spec in model.inputs for dim in spec.shape)
    unknown = sorted(set(dynamic) - set(known))
    if unknown:
        raise UsageError(f"--dynamic {unknown[0]}: no such symbol", hint=f"symbols: {', '.join(known) or 'none'}")

    multiple = _multiple(model.inputs)
    defaults = {**_DEFAULT_SIZES, **getattr(model, "examples", {})}
    padded = _up(_DEFAULT_SIZE, multiple)
    example = {symbol: symbols.get(symbol, defaults.get(symbol, padded)) for symbol in known}
    fixed = {symbol: size for symbol, size in symbols.items() if symbol not in dynamic}

    def data(spec: TensorSpec) -> TensorSpec:
        dtype = precision if spec.dtype.startswith("float") else spec.dtype
        return msgspec.structs.replace(spec, shape=substitute(spec.shape, fixed), dtype=dtype)

    initial = getattr(model, "initial", {})
    strangers = sorted(set(initial) - {state.name for state in model.states})
    if strangers:
        raise ExportError(f"initial: the model has no state {strangers[0]!r}")

    def remembered(state: StateSpec) -> StateSpec:
        dtype = _state_dtype(state_dtype) if state.dtype.startswith("float") else state.dtype
        spec = msgspec.structs.replace(state, shape=substitute(state.shape, fixed), dtype=dtype)
        if state.name not in initial:
            return spec
        value = initial[state.name].detach().cpu().to(TORCH_DTYPES[dtype]).numpy()
        return msgspec.structs.replace(spec, init=InitialValue.of(value))

    def mapped(spec: TensorSpec) -> TensorSpec:
        return msgspec.structs.replace(spec, layout=spec.layout or map_layout(spec.shape, inputs))

    states = tuple(map(remembered, model.states))
    inputs = tuple(completed(data(spec)) for spec in model.inputs)
    assert isinstance(model, nn.Module)
    contract = StepContract(
        inputs=inputs,
        outputs=tuple(completed(mapped(data(spec))) for spec in model.outputs),
        states=states,
        precision=precision,  # type: ignore[arg-type]
        cells=cell_specs(model),
        example=example,
    )
    contract.check("step model")
    contract.bind({spec.name: _concrete(spec, example) for spec in contract.inputs})  # pad multiple
    return contract


def sizes_for_trace(contract: StepContract) -> dict[str, int]:
    """Sizes to trace with: every dynamic one is above 1 and different from the others.

    The tracer treats a size of 1 as constant, and equal sizes as the same symbol.
    """
    sizes = dict(contract.example)
    for symbol in contract.symbols:
        step = 1 if symbol == "batch" else _multiple(contract.inputs)
        while sizes[symbol] == 1 or list(sizes.values()).count(sizes[symbol]) > 1:
            sizes[symbol] += step
    return sizes


def sizes_for_check(contract: StepContract, *, scale: float = 1.0) -> list[dict[str, int]]:
    """Sizes to compare at: small where they are dynamic, and two sets, to find sizes that were fixed by mistake.

    Args:
        scale: of them, for a model whose step is expensive; none becomes smaller than `_SMALLEST`.
    """
    multiple = _multiple(contract.inputs)
    first, second = dict(contract.example), dict(contract.example)
    if "batch" in contract.symbols:
        first["batch"], second["batch"] = 1, 2
    for index, symbol in enumerate(symbol for symbol in contract.symbols if symbol != "batch"):
        one, other = _CHECK_SIZES[index % len(_CHECK_SIZES)]
        one, other = (_up(max(_SMALLEST, round(scale * size)), multiple) for size in (one, other))
        first[symbol] = min(first[symbol], one)
        second[symbol] = min(second[symbol], other + multiple * (other == one))
    return [first, second] if contract.symbols else [first]


def example_tensors(contract: StepContract, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """Zeros for every data input and state, in the order of `forward`'s arguments."""
    return tuple(
        torch.zeros(resolve(spec.shape, sizes), dtype=TORCH_DTYPES[spec.dtype])
        for spec in contract.graph_inputs.values()
    )


def _multiple(inputs: Sequence[TensorSpec]) -> int:
    return max([2 if nv12_of(spec) else spec.pad_multiple for spec in inputs], default=1)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _concrete(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = substitute(spec.shape, sizes)
    return tuple(dim for dim in shape if isinstance(dim, int))


def _state_dtype(name: str) -> DType:
    if name not in ("float16", "float32"):
        raise ExportError(f"state dtype: expected float16 or float32, got {name!r}")
    return name  # type: ignore[return-value]
