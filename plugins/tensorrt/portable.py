"""Portable form of the plugin: each kernel is PTX in the plan, which TensorRT launches without Python.

It uses TensorRT's quickly deployable plugins (`tensorrt.plugin`, ahead-of-time part, TensorRT 10.9 and later), so
the plan runs in trtexec, C++ or Triton Inference Server. TensorRT passes the inputs, then integers, then the outputs,
and nothing else (docs.nvidia.com/deeplearning/tensorrt, "Quickly Deployable Plugins"), and does not raise the limit
of 48 KB shared memory. Not yet run with a TensorRT that has them.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import GenericAlias
from typing import Any

from stepcell.errors import BuildError
from stepcell.ops import DOMAIN
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.compile import compile_ptx
from stepcell.plugins.kernels.launcher import driver_ptx_version
from stepcell.plugins.kernels.signature import PARAMETERS, kernel_inputs, kernel_outputs, pointer_dtype
from stepcell.plugins.kernels.tiles import Tile, tiles
from stepcell.plugins.tensorrt.registry import CELL_ATTRIBUTE

__all__ = ["PortableKernel", "node_name", "portable_kernels", "portable_ptx", "register_portable"]

SHARED_LIMIT = 48 * 1024
_STATE_LIKE = ("state", "h", "rh")  # inputs that have the shape of the outputs

# By kernel and label of the cell, one per tile. Process-wide, as TensorRT's registry is.
_kernels: dict[tuple[str, str], Sequence[PortableKernel]] = {}
_registered: set[str] = set()


@dataclass(frozen=True)
class PortableKernel:
    """A kernel in the form that TensorRT launches.

    Attributes:
        entry: name of the function.
        ptx: its parameters are inputs, H, W, P, outputs.
        grid_pixels, grid_channels: a launch has ceil(P / grid_pixels) by grid_channels programs.
        threads: per program.
        shared_bytes: dynamic shared memory per program, at most 48 KB.
    """

    entry: str
    ptx: str
    grid_pixels: int
    grid_channels: int
    threads: int
    shared_bytes: int


def portable_kernels(
    kernel: str, cell: CellConfig, capability: str, pixels: int | None = None
) -> tuple[PortableKernel, ...]:
    """Compile a kernel with every tile of the table, each with as many stages as fit; about a second per tile.

    Split and overlapping tiles are left out, because TensorRT provides neither memory nor launch attributes here.
    The PTX version is limited to what the driver of this machine translates: an engine is built where it runs.

    Raises:
        UsageError: the kernels are not compiled for this compute capability.
        MissingDependencyError: Triton is not installed.
        BuildError: Triton failed, or a tile does not fit.
    """
    version = driver_ptx_version()
    plain = dict.fromkeys(replace(tile, overlap=False) for tile in tiles(kernel, cell, capability, pixels))
    return tuple(_fitting(kernel, cell, tile, capability, version) for tile in plain if tile.splits == 1)


def _fitting(kernel: str, cell: CellConfig, tile: Tile, capability: str, ptx_version: int | None) -> PortableKernel:
    for stages in range(tile.stages, 0, -1):
        compiled = compile_ptx(kernel, cell, replace(tile, stages=stages), capability, ptx_version=ptx_version)
        if compiled.shared_bytes <= SHARED_LIMIT:
            return PortableKernel(
                entry=compiled.entry,
                ptx=portable_ptx(kernel, cell, compiled.text),
                grid_pixels=tile.pixels,
                grid_channels=-(-padded(cell.hidden) // tile.channels),
                threads=compiled.threads,
                shared_bytes=compiled.shared_bytes,
            )
    raise BuildError(f"{kernel} of {cell.label}, tile {tile.label}: needs more than 48 KB of shared memory")


def node_name(kernel: str, cell: CellConfig) -> str:
    """Operator name of a kernel's node; kernels with different numbers of inputs need different names."""
    return f"{kernel}_peephole" if kernel == "lstm_step" and cell.variant != "none" else kernel


def portable_ptx(kernel: str, cell: CellConfig, ptx: str) -> str:
    """Reorder the parameters of Triton's PTX as TensorRT passes them: inputs, H, W, P, outputs.

    The code refers to parameters by name, so only the declarations move. Parameters that the cell does not use, and
    the two scratch pointers of Triton, are removed.

    Raises:
        BuildError: the PTX does not have the expected form, or the code reads a removed parameter.
    """
    names = [each.name for each in PARAMETERS[kernel]]
    head, opening, rest = ptx.partition(f".entry {kernel}(\n")
    block, closing, body = rest.partition("\n)")
    declared = [line.rstrip(",") for line in block.split("\n")]
    if not opening or not closing or len(declared) != len(names) + 2:
        raise BuildError(f"{kernel}: the PTX of this Triton version does not have the expected form")
    order = [each.name for each in kernel_inputs(kernel, cell)] + ["H", "W", "P"]
    order += [each.name for each in kernel_outputs(kernel)]
    kept = [names.index(name) for name in order]
    read = {int(number) for number in re.findall(rf"\b{kernel}_param_(\d+)\b", body)}
    if read - set(kept):
        raise BuildError(f"{kernel}: the code reads parameters that TensorRT does not pass: {sorted(read - set(kept))}")
    return head + opening + ",\n".join(declared[index] for index in kept) + closing + body


def register_portable(trt: Any, kernels: Mapping[tuple[str, str], Sequence[PortableKernel]]) -> None:
    """Register the operators of onnx/chain.py with a TensorRT module that has `tensorrt.plugin`.

    Args:
        kernels: by kernel and label of the cell; kept until replaced by others with the same key.
    """
    plugins = importlib.import_module(f"{trt.__name__}.plugin")
    _kernels.update(kernels)
    for kernel, label in kernels:
        cell = CellConfig.from_label(label)
        if node_name(kernel, cell) not in _registered:
            _registered.add(node_name(kernel, cell))
            _register(trt, plugins, kernel, cell)


def _register(trt: Any, plugins: Any, kernel: str, cell: CellConfig) -> None:
    """Register one operator; `cell` is any cell that uses it."""
    name = f"{DOMAIN}::{node_name(kernel, cell)}"
    tensors = [each.name for each in kernel_inputs(kernel, cell)]
    outputs = len(kernel_outputs(kernel))
    like = next(tensors.index(each) for each in _STATE_LIKE if each in tensors)
    described: Any = GenericAlias(tuple, (plugins.TensorDesc,) * outputs)

    def cell_of(label: str) -> CellConfig:
        return CellConfig.from_label(label.rstrip("\0"))  # TensorRT's parser appends a zero byte to strings

    def describe(*inputs: Any, **attributes: str) -> Any:
        its_cell, shape = cell_of(attributes[CELL_ATTRIBUTE]), inputs[like].shape_expr
        dtypes = [_dtype(trt, pointer_dtype(each, its_cell)) for each in kernel_outputs(kernel)]
        return tuple(plugins.from_shape_expr(shape, dtype) for dtype in dtypes)

    def autotune(*arguments: Any) -> Any:
        its_cell = cell_of(arguments[len(tensors)])
        combination = plugins.AutoTuneCombination()
        for place, each in enumerate((*kernel_inputs(kernel, its_cell), *kernel_outputs(kernel))):
            dtype = pointer_dtype(each, its_cell)
            is_map = "." not in each.buffer and dtype == "float16"
            combination.pos([place], "FP16" if dtype == "float16" else "FP32", "HWC8" if is_map else "LINEAR")
        combination.tactics(list(range(1, len(_kernels[kernel, its_cell.label]) + 1)))
        return [combination]

    def implementation(*arguments: Any) -> Any:
        found = _kernels[kernel, cell_of(arguments[len(tensors)]).label]
        chosen = found[max(int(arguments[-1] or 1), 1) - 1]
        batch, _, height, width = (arguments[like].shape_expr[axis] for axis in range(4))
        pixels = batch * height * width
        launch = plugins.KernelLaunchParams()
        launch.grid_x, launch.grid_y = plugins.cdiv(pixels, chosen.grid_pixels), chosen.grid_channels
        launch.block_x, launch.shared_mem = chosen.threads, chosen.shared_bytes
        numbers = plugins.SymIntExprs(3)
        for place, number in enumerate((height, width, pixels)):
            numbers[place] = plugins.SymInt32(number)
        return chosen.entry, chosen.ptx, launch, numbers

    code = tuple[str, str, plugins.KernelLaunchParams, plugins.SymIntExprs]
    inputs = {**dict.fromkeys(tensors, plugins.TensorDesc), CELL_ATTRIBUTE: str}
    plugins.register(name)(_signed(describe, inputs, described))
    more = {**inputs, "outputs": described}
    plugins.autotune(name)(_signed(autotune, more, list[plugins.AutoTuneCombination]))
    plugins.aot_impl(name)(_signed(implementation, {**more, "tactic": int}, code))


def _signed(function: Callable[..., Any], parameters: Mapping[str, Any], returns: Any) -> Callable[..., Any]:
    """Give a function the signature from which `tensorrt.plugin` reads the operator's tensors."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed: Iterable[inspect.Parameter] = (
        inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()
    )
    function.__signature__ = inspect.Signature(list(listed), return_annotation=returns)  # type: ignore[attr-defined]
    return function


def _dtype(trt: Any, name: str) -> Any:
    return trt.DataType.HALF if name == "float16" else trt.DataType.FLOAT
