"""Choice between the fused plugin and TensorRT's own layers: builds the requested one, or both and keeps the faster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from stepcell.errors import PluginError, StepcellError
from stepcell.onnx_model import OnnxFile
from stepcell.plugins.prepare import PreparedModel, has_cells, plugin_unavailable, prepare, unchanged
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.plan import BuiltPlan
from stepcell.runtime.engine.profile import Profile
from stepcell.runtime.engine.sidecar import PluginUse
from stepcell.runtime.engine.tensorrt_module import TensorRT
from stepcell.runtime.engine.timing import step_milliseconds

__all__ = ["choose_plan"]

logger = logging.getLogger(__name__)


def choose_plan(
    library: TensorRT,
    file: OnnxFile,
    profiles: Mapping[str, Profile],
    options: BuildOptions,
    capability: str,
    build: Callable[[PreparedModel], BuiltPlan],
) -> tuple[BuiltPlan, PluginUse | None]:
    """Build the plan with the plugin or without it, as `options.plugin` says; "auto": both, and keep the faster.

    Args:
        capability: compute capability of the GPU to build for.
        build: makes a plan of a prepared model.

    Returns:
        The plan, and the decision with its reason; None: the plugin is switched off, or the model has no cells.

    Raises:
        PluginError: the plugin was required and cannot run this model, or has no kernels for it.
        BuildError, ContractError: as `build_plan`.
    """
    required = options.plugin in ("on", "portable")
    if required and not has_cells(file.model):
        raise PluginError(f"--plugin {options.plugin}: {file.path} has no ConvGRU or ConvLSTM node that it could run")
    if options.plugin == "off" or not has_cells(file.model):
        return build(unchanged(file)), None
    try:
        plan = _with_plugin(library, file, profiles, options, capability, build)
    except StepcellError as error:
        if required:
            raise
        return build(unchanged(file)), _not_used(error)
    if required:
        cells, reason = plan.source.cells, f"asked for with --plugin {options.plugin}"
        logger.info(f"plugin:  {options.plugin}; it runs {', '.join(cells)}")
        return plan, PluginUse(used=True, reason=reason, portable=options.plugin == "portable", cells=cells)
    return _faster(library, plan, build(unchanged(file)))


def _with_plugin(
    library: TensorRT,
    file: OnnxFile,
    profiles: Mapping[str, Profile],
    options: BuildOptions,
    capability: str,
    build: Callable[[PreparedModel], BuiltPlan],
) -> BuiltPlan:
    reason = plugin_unavailable(library.flavor, library.module)
    if reason:
        raise PluginError(reason)
    shapes = {name: profile.opt for name, profile in profiles.items()}
    kernels = None if options.kernels is None else Path(options.kernels)
    portable = options.plugin == "portable"
    with prepare(file, shapes, library.module, capability, kernels=kernels, portable=portable) as prepared:
        return build(prepared)


def _faster(library: TensorRT, plan: BuiltPlan, native: BuiltPlan) -> tuple[BuiltPlan, PluginUse]:
    """Time a step of both plans; take the native one on a tie or if timing fails."""
    cells = plan.source.cells
    try:
        plugin_time, native_time = (step_milliseconds(library, each.data, each.profiles) for each in (plan, native))
    except StepcellError as error:
        return native, _not_used(error, cells)
    reason = f"{plugin_time:.3f} ms a step with the plugin, {native_time:.3f} ms with TensorRT's own layers"
    faster = plugin_time < native_time
    logger.info(f"plugin:  {'on' if faster else 'off'}; {reason}")
    use = PluginUse(
        used=faster,
        reason=reason,
        cells=cells,
        plugin_milliseconds=round(plugin_time, 4),
        native_milliseconds=round(native_time, 4),
    )
    return (plan if faster else native), use


def _not_used(error: StepcellError, cells: tuple[str, ...] = ()) -> PluginUse:
    logger.info(f"plugin:  off; {error.message}")
    return PluginUse(used=False, reason=error.message, cells=cells)
