"""Facade of the plugin for engine builds: checks whether it can be used, and prepares a model for it.

runtime/engine uses the plugin through this module and knows nothing of kernels, tiles and packed weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepcell.contract import Spec
from stepcell.errors import PluginError
from stepcell.onnx_model import OnnxFile
from stepcell.ops import DOMAIN
from stepcell.plugins.fp16_mirrors import Fp16Mirror, engine_tensors
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.signature import kernels_of
from stepcell.plugins.kernels.store import default_folder, images_for
from stepcell.plugins.onnx.chain import chained_model
from stepcell.plugins.onnx.rewrite import has_cells, plugin_model
from stepcell.plugins.tensorrt.fields import PluginIdentity, plugin_identity
from stepcell.plugins.tensorrt.portable import PortableKernel, portable_kernels, register_portable
from stepcell.plugins.tensorrt.registry import kernels_offered, register

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["PreparedModel", "has_cells", "plugin_unavailable", "prepare", "unchanged"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedModel:
    """An ONNX model in the form that TensorRT's parser gets.

    Attributes:
        path: the file it was made from.
        model, data: the model, and its bytes.
        inputs, outputs: tensors of the engine by name: the contract's, then fp16 mirrors.
        operators: (domain, name) of the nodes that a registered plugin takes.
        fp16_mirrors: inputs and outputs beyond the contract.
        cells: labels of the cells that the plugin runs.
        identity: the plugin that must be registered before the engine is loaded; None: no plugin.
    """

    path: Path
    model: ModelProto
    data: bytes
    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    operators: frozenset[tuple[str, str]] = frozenset()
    fp16_mirrors: tuple[Fp16Mirror, ...] = ()
    cells: tuple[str, ...] = ()
    identity: PluginIdentity | None = None

    @property
    def channels_last(self) -> frozenset[str]:
        """Tensors that must be bound in TensorRT's format kHWC8."""
        return frozenset(name for mirror in self.fp16_mirrors for name in (mirror.input, mirror.output))


def plugin_unavailable(flavor: str, module: Any = None) -> str:
    """Why the plugin cannot be used with a TensorRT flavour, in one sentence; empty: it can be used.

    Args:
        flavor: "tensorrt" or "tensorrt-rtx".
        module: the vendor's module; None: judge by the flavour alone.
    """
    if flavor == "tensorrt-rtx":
        return "TensorRT-RTX has no way to host a custom plugin; recurrent cells run as its own layers"
    if module is not None and not hasattr(module.INetworkDefinition, "add_plugin_v3"):
        needs = f"TensorRT {module.__version__} cannot host the plugin, which needs 10.0 or later"
        return f"{needs}; recurrent cells run as its own layers"
    return ""


def unchanged(file: OnnxFile) -> PreparedModel:
    """The unchanged model: its cells run as TensorRT's own layers."""
    return PreparedModel(file.path, file.model, file.data, file.contract.graph_inputs, file.contract.graph_outputs)


@contextlib.contextmanager
def prepare(
    file: OnnxFile,
    shapes: Mapping[str, Sequence[int]],
    module: Any,
    capability: str,
    *,
    kernels: Path | None = None,
    portable: bool = False,
) -> Iterator[PreparedModel]:
    """Rewrite a model for the plugin, get its kernels and register it; TensorRT parses inside the block.

    Args:
        file: the exported model.
        shapes: shapes of the inputs and states by input name, to choose tiles for.
        module: the vendor's TensorRT module.
        capability: compute capability to build for, such as "8.7".
        kernels: folder of compiled kernels, completed where some are missing; None: the user's cache.
        portable: prepare the form that TensorRT runs without stepcell.

    Raises:
        PluginError: a cell that the plugin cannot take, or kernels that can be neither compiled nor found.
        UsageError: a compute capability that is not compiled for.
        BuildError, InputError, OutputError, MissingDependencyError: as `images_for` and `portable_kernels`.
    """
    rewritten = plugin_model(file.model, () if portable else file.contract.states)
    sizes = _sizes(rewritten.cells, shapes)
    labels = tuple(cell.label for _, cell in rewritten.cells)
    if portable:
        register_portable(module, _portable_kernels(sizes, capability))
        yield _prepared(file, chained_model(rewritten.model), labels)
        return
    folder = default_folder() if kernels is None else kernels
    images = {cell.label: _images(cell, capability, folder, pixels) for cell, pixels in sizes.items()}
    register(module)
    with kernels_offered(images):
        yield _prepared(file, rewritten.model, labels, rewritten.fp16_mirrors, plugin_identity())


def _prepared(
    file: OnnxFile,
    model: ModelProto,
    cells: tuple[str, ...],
    mirrors: tuple[Fp16Mirror, ...] = (),
    identity: PluginIdentity | None = None,
) -> PreparedModel:
    return PreparedModel(
        file.path,
        model,
        model.SerializeToString(deterministic=True),
        *engine_tensors(file.contract, mirrors),
        operators=frozenset((node.domain, node.op_type) for node in model.graph.node if node.domain == DOMAIN),
        fp16_mirrors=mirrors,
        cells=cells,
        identity=identity,
    )


def _sizes(
    cells: Sequence[tuple[str, CellConfig]], shapes: Mapping[str, Sequence[int]]
) -> dict[CellConfig, int | None]:
    """Pixels (batch * height * width) of the largest map of each cell; None: its state is no input of the model."""
    sizes: dict[CellConfig, int | None] = {}
    for state, cell in cells:
        shape = shapes.get(state, ())
        pixels = shape[0] * shape[2] * shape[3] if len(shape) == 4 else None
        sizes[cell] = max(filter(None, (sizes.get(cell), pixels)), default=None)
    return sizes


def _images(cell: CellConfig, capability: str, folder: Path, pixels: int | None) -> tuple[KernelImage, ...]:
    try:
        images = tuple(images_for(cell, capability, folder, pixels))
    except PluginError:  # no Triton here, and the kernels were precompiled without the map sizes
        images = tuple(images_for(cell, capability, folder))
    logger.info(f"kernels: {len(images)} for {cell.label} on {capability}, from {folder}")
    return images


def _portable_kernels(
    sizes: Mapping[CellConfig, int | None], capability: str
) -> dict[tuple[str, str], Sequence[PortableKernel]]:
    found: dict[tuple[str, str], Sequence[PortableKernel]] = {}
    for cell, pixels in sizes.items():
        for kernel in kernels_of(cell, fp16_mirror=False):
            found[kernel, cell.label] = portable_kernels(kernel, cell, capability, pixels)
        logger.info(f"kernels: for {cell.label} on {capability}, compiled into the engine")
    return found
