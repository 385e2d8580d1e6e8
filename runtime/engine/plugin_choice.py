"""Which form of its cells goes into an engine: the fused plugin, or TensorRT's own layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.errors import PluginError, StepcellError
from stepcell.ops import DOMAIN
from stepcell.plugins import plugin_unavailable
from stepcell.plugins.fp16_mirrors import Fp16Mirror
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.signature import kernels_of
from stepcell.plugins.kernels.store import default_folder, images_for
from stepcell.plugins.onnx.chain import chained_model
from stepcell.plugins.onnx.rewrite import has_cells, plugin_model
from stepcell.plugins.tensorrt.portable import PortableKernel, portable_kernels, register_portable
from stepcell.plugins.tensorrt.registry import kernels_offered, register
from stepcell.runtime.engine.onnx_input import OnnxFile
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.plan import BuiltPlan, build_plan
from stepcell.runtime.engine.profile import Profile
from stepcell.runtime.engine.sidecar import PluginUse
from stepcell.runtime.engine.tensorrt_module import TensorRT
from stepcell.runtime.engine.timing import step_milliseconds

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["build_form"]


def build_form(
    library: TensorRT,
    file: OnnxFile,
    profiles: Mapping[str, Profile],
    options: BuildOptions,
    timings: bytes | None,
    capability: str,
    say: Callable[[str], None],
) -> tuple[BuiltPlan, PluginUse | None]:
    """Build the plan in the form that was asked for; "auto": both, and keep the faster.

    Args:
        timings: as in `build_plan`.
        capability: compute capability of the GPU to build for.
        say: takes a line for a person.

    Returns:
        the plan, and how it was decided; None: there was nothing to decide.

    Raises:
        PluginError: the plugin was insisted on and cannot take this model, or has no kernels for it.
        BuildError, ContractError: as `build_plan`.
    """

    def native() -> BuiltPlan:
        return build_plan(library, file, profiles, options, timings)

    insisted = options.plugin in ("on", "portable")
    if options.plugin == "off":
        return native(), None
    if not has_cells(file.model):
        if insisted:
            raise PluginError(
                f"--plugin {options.plugin}: {file.path} has no ConvGRU or ConvLSTM node that it could run"
            )
        return native(), None
    reason = plugin_unavailable(library.flavor, library.module)
    if reason:
        say(f"plugin:  off; {reason}")
        return native(), PluginUse(used=False, reason=reason)
    try:
        plan, cells = _with_plugin(library, file, profiles, options, timings, capability, say)
    except StepcellError as error:
        if insisted:
            raise
        say(f"plugin:  off; {error.message}")
        return native(), PluginUse(used=False, reason=error.message)
    if insisted:
        say(f"plugin:  {options.plugin}; it runs {', '.join(cells)}")
        reason, portable = f"asked for with --plugin {options.plugin}", options.plugin == "portable"
        return plan, PluginUse(used=True, reason=reason, portable=portable, cells=cells)
    own = native()
    try:
        plugin_time, native_time = (
            step_milliseconds(library, each.data, profiles, each.fp16_mirrors) for each in (plan, own)
        )
    except StepcellError as error:
        say(f"plugin:  off; {error.message}")
        return own, PluginUse(used=False, reason=error.message, cells=cells)
    reason = f"{plugin_time:.3f} ms a step with the plugin, {native_time:.3f} ms with TensorRT's own layers"
    faster = plugin_time < native_time
    say(f"plugin:  {'on' if faster else 'off'}; {reason}")
    use = PluginUse(
        used=faster,
        reason=reason,
        cells=cells,
        plugin_milliseconds=round(plugin_time, 4),
        native_milliseconds=round(native_time, 4),
    )
    return (plan if faster else own), use


def _with_plugin(
    library: TensorRT,
    file: OnnxFile,
    profiles: Mapping[str, Profile],
    options: BuildOptions,
    timings: bytes | None,
    capability: str,
    say: Callable[[str], None],
) -> tuple[BuiltPlan, tuple[str, ...]]:
    """The plan with the plugin, and the labels of the cells it runs."""
    changed = plugin_model(file.model, () if options.plugin == "portable" else file.contract.states)
    labels = tuple(cell.label for _, cell in changed.cells)
    sizes = _sizes(changed.cells, profiles)
    if options.plugin == "portable":
        register_portable(library.module, _portable(sizes, capability, say))
        rewritten = _rewritten(file, chained_model(changed.model))
        return build_plan(library, rewritten, profiles, options, timings), labels
    folder = default_folder() if options.kernels is None else Path(options.kernels)
    kernels = {cell.label: _kernels(cell, capability, folder, pixels, say) for cell, pixels in sizes.items()}
    register(library.module)
    with kernels_offered(kernels):
        rewritten = _rewritten(file, changed.model, changed.fp16_mirrors)
        return build_plan(library, rewritten, profiles, options, timings), labels


def _rewritten(file: OnnxFile, model: ModelProto, copies: tuple[Fp16Mirror, ...] = ()) -> OnnxFile:
    """The file as TensorRT is to see it; every node of the op's domain is a plugin's."""
    plugins = frozenset((node.domain, node.op_type) for node in model.graph.node if node.domain == DOMAIN)
    data = model.SerializeToString(deterministic=True)
    return dataclasses.replace(file, model=model, data=data, plugins=plugins, fp16_mirrors=copies)


def _portable(
    sizes: Mapping[CellConfig, int | None], capability: str, say: Callable[[str], None]
) -> dict[tuple[str, str], Sequence[PortableKernel]]:
    found: dict[tuple[str, str], Sequence[PortableKernel]] = {}
    for cell, pixels in sizes.items():
        for kernel in kernels_of(cell, fp16_mirror=False):
            found[kernel, cell.label] = portable_kernels(kernel, cell, capability, pixels)
        say(f"kernels: for {cell.label} on {capability}, compiled into the engine")
    return found


def _kernels(
    cell: CellConfig, capability: str, folder: Path, pixels: int | None, say: Callable[[str], None]
) -> tuple[KernelImage, ...]:
    try:
        images = tuple(images_for(cell, capability, folder, pixels))
    except PluginError:  # no Triton; the folder was filled on a machine that did not know the sizes
        images = tuple(images_for(cell, capability, folder))
    say(f"kernels: {len(images)} for {cell.label} on {capability}, from {folder}")
    return images


def _sizes(cells: tuple[tuple[str, CellConfig], ...], profiles: Mapping[str, Profile]) -> dict[CellConfig, int | None]:
    """Pixels of the largest map of each cell at the `opt` sizes; None: its state is no input of the model."""
    sizes: dict[CellConfig, int | None] = {}
    for state, cell in cells:
        shape = profiles[state].opt if state in profiles else ()
        pixels = shape[0] * shape[2] * shape[3] if len(shape) == 4 else None
        sizes[cell] = max(filter(None, (sizes.get(cell), pixels)), default=None)
    return sizes
