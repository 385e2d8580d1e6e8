"""Registration of the plugin: creators in TensorRT's registry, used by its ONNX parser and its runtime."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from stepcell.errors import EngineMismatchError, PluginError
from stepcell.ops import DOMAIN, OPS
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION, read_fields
from stepcell.plugins.tensorrt.plugin import FIELDS, plugin_class

__all__ = ["CELL_ATTRIBUTE", "FP16_MIRROR_ATTRIBUTE", "kernels_offered", "register"]

# Attributes of the ONNX node.
CELL_ATTRIBUTE = "cell"  # label of the cell
FP16_MIRROR_ATTRIBUTE = "fp16_mirror"  # 1 if the fp16 mirror of h is an input; otherwise absent

# TensorRT has one registry per process, so there is one set of creators per module.
_creators: dict[str, list[Any]] = {}
_registering = threading.Lock()
# By label of the cell. TensorRT's parser calls a creator in the thread that parses, so builds in several threads
# each find their own.
_kernels: ContextVar[Mapping[str, Sequence[KernelImage]]] = ContextVar("kernels offered to the parser")


def register(trt: Any) -> None:
    """Register the plugin with a TensorRT module; needed before it parses a model or loads a plan. Idempotent.

    Raises:
        PluginError: TensorRT refuses it because another plugin has its name.
    """
    with _registering:
        if trt.__name__ in _creators:
            return
        creator = _creator_class(trt)
        made = [creator(op) for op in OPS]  # TensorRT holds no reference: `_creators` keeps them alive
        for each in made:
            if not trt.get_plugin_registry().register_creator(each, DOMAIN):
                raise PluginError(f"TensorRT's registry already has a plugin {DOMAIN}::{each.name}")
        _creators[trt.__name__] = made


@contextlib.contextmanager
def kernels_offered(kernels: Mapping[str, Sequence[KernelImage]]) -> Iterator[None]:
    """Offer kernels to the plugins that a parser makes in this thread while the block runs.

    Args:
        kernels: by label of the cell.
    """
    token = _kernels.set({**_kernels.get({}), **kernels})
    try:
        yield
    finally:
        _kernels.reset(token)


def _creator_class(trt: Any) -> type:
    base: Any = trt.IPluginCreatorV3One
    plugin = plugin_class(trt)

    class CellPluginCreator(base):  # type: ignore[misc]  # the base depends on the module
        def __init__(self, op: str) -> None:
            base.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op, DOMAIN, PLUGIN_VERSION
            empty = np.zeros(0, np.int8)
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(CELL_ATTRIBUTE, empty, trt.PluginFieldType.CHAR),
                    trt.PluginField(FP16_MIRROR_ATTRIBUTE, empty, trt.PluginFieldType.INT32),
                ]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """Create the plugin of an ONNX node (build phase) or of a node in a plan (runtime phase).

            Raises:
                PluginError: the node has no cell, a cell of another op, or one without kernels.
                UsageError: the label cannot be read.
                EngineMismatchError: the bytes in the plan cannot be used.
            """
            found = {field.name: np.asarray(field.data).tobytes() for field in fields}
            images: Sequence[KernelImage]
            if phase == trt.TensorRTPhase.RUNTIME:
                if FIELDS not in found:
                    raise EngineMismatchError(f"plugin {name}: the plan holds nothing for it")
                cell, images, fp16_mirror = read_fields(found[FIELDS])
            else:
                cell, images = self._offered(name, found)
                fp16_mirror = any(found.get(FP16_MIRROR_ATTRIBUTE, b""))  # an integer of any width
            if cell.op != self.name:
                raise PluginError(f"plugin {name}: expected a cell of {self.name}, got {cell.label}")
            return plugin(cell, images, fp16_mirror)

        def _offered(self, name: str, found: Mapping[str, bytes]) -> tuple[CellConfig, Sequence[KernelImage]]:
            if CELL_ATTRIBUTE not in found:
                raise PluginError(f"plugin {name}: the node has no attribute {CELL_ATTRIBUTE!r}")
            # TensorRT's parser appends a zero byte to strings.
            cell = CellConfig.from_label(found[CELL_ATTRIBUTE].rstrip(b"\0").decode(errors="replace"))
            images = _kernels.get({}).get(cell.label)
            if images is None:
                raise PluginError(f"plugin {name}: there are no kernels for {cell.label}")
            return cell, images

    return CellPluginCreator
