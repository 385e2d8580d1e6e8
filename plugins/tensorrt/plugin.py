"""TensorRT plugin class that runs a node of the ops by the fused kernels.

TensorRT's base classes are known only after a TensorRT module is loaded, so the class is created per module.
The interface is IPluginV3 of TensorRT 10.0 to 11.x (docs.nvidia.com/deeplearning/tensorrt, "Adding
Custom Layers using the Python API"). Methods raise on failure, and TensorRT reports the message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, PluginError
from stepcell.ops import DOMAIN
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.signature import kernels_of
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION, pack_fields
from stepcell.plugins.tensorrt.step import CellStep, tactics, workspace_size
from stepcell.plugins.tensorrt.tensors import Tensor, inputs_of, outputs_of
from stepcell.runtime import cuda

__all__ = ["FIELDS", "plugin_class"]

FIELDS = "stepcell"  # name of the serialised field in a plan


def plugin_class(trt: Any) -> type:
    """Create the plugin class for a TensorRT module.

    Its constructor takes a cell, the images of its kernels, and whether the node has the fp16 mirror of h as input.
    """
    bases: Any = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class CellPlugin(*bases):  # type: ignore[misc]  # the bases depend on the module
        def __init__(self, cell: CellConfig, images: Sequence[KernelImage], fp16_mirror: bool, tactic: int = 1) -> None:
            for base in bases:
                base.__init__(self)  # the bindings require each by name
            kernels = kernels_of(cell, fp16_mirror=fp16_mirror)
            self.images = tuple(image for image in images if image.info.kernel in kernels)
            self.cell, self.fp16_mirror, self.tactic = cell, fp16_mirror, tactic
            self.inputs, self.outputs = inputs_of(cell, fp16_mirror=fp16_mirror), outputs_of(cell)
            self.tactics = tactics(cell, self.images, fp16_mirror=fp16_mirror)
            self.plugin_name, self.plugin_namespace, self.plugin_version = cell.op, DOMAIN, PLUGIN_VERSION
            self.num_outputs = len(self.outputs)
            # Nodes with the same cell and kernels share their timings.
            keys = " ".join(image.info.key for image in self.images)
            self.timing_cache_id = f"{cell.label}-{hashlib.sha256(keys.encode()).hexdigest()[:16]}"
            self._size: tuple[int, int, int] | None = None
            self._step: CellStep | None = None
            self._loaded_tactic = 0
            self._bytes: NDArray[np.int8] | None = None

        def get_capability_interface(self, capability: Any) -> Any:
            return self

        def clone(self) -> CellPlugin:
            copy = CellPlugin(self.cell, self.images, self.fp16_mirror, self.tactic)
            copy._size = self._size
            return copy

        # Building

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            states = len(self.outputs) - 1
            return [*input_types[1 : 1 + states], input_types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            """Each output has the shape of its state, y the shape of h; dynamic sizes are passed through."""
            states = len(self.outputs) - 1
            return [trt.DimsExprs(each) for each in (*inputs[1 : 1 + states], inputs[1])]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            tensor, desc = (*self.inputs, *self.outputs)[pos], in_out[pos].desc
            dtype = trt.DataType.HALF if tensor.dtype == "float16" else trt.DataType.FLOAT
            layout = trt.TensorFormat.HWC8 if tensor.channels_last else trt.TensorFormat.LINEAR
            return bool(desc.type == dtype and desc.format == layout)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Refuse tensors that do not match the cell, and maps that the kernels cannot address."""
            if (len(inputs), len(outputs)) != (len(self.inputs), len(self.outputs)):
                raise PluginError(
                    f"{self.cell.label}: expected {len(self.inputs)} inputs and {len(self.outputs)} outputs, "
                    f"got {len(inputs)} and {len(outputs)}"
                )
            for tensor, dynamic in zip((*self.inputs, *self.outputs), (*inputs, *outputs), strict=True):
                self._check_channels(tensor, tuple(dynamic.desc.dims))
            batch, _, height, width = tuple(inputs[1].max)
            most = min(image.info.max_pixels for image in self.images)
            if batch * height * width > most:
                raise InputError(
                    f"{self.cell.label}: takes up to {most} pixels, the sizes allow {batch} x {height} x {width}",
                    hint="make --maxShapes smaller, or build with --plugin off",
                )

        def _check_channels(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
            channels = self.cell.inputs if tensor.buffer == "x" else self.cell.hidden
            is_map = "." not in tensor.buffer
            if len(shape) != (4 if is_map else 1) or (is_map and shape[1] not in (channels, -1)):
                expected = f"(batch, {channels}, height, width)" if is_map else "one dimension, packed"
                raise PluginError(f"{self.cell.label}: {tensor.buffer} must have {expected}, got {shape}")

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            batch, _, height, width = tuple(inputs[1].max)
            return workspace_size(self.cell, self.images, batch * height * width, fp16_mirror=self.fp16_mirror)

        def get_valid_tactics(self) -> list[int]:
            return list(range(1, len(self.tactics) + 1))

        # Running

        def set_tactic(self, tactic: int) -> None:
            self.tactic = max(tactic, 1)  # 0 stands for the default
            if self._size is not None:
                self._load()

        def attach_to_context(self, resource_context: Any) -> CellPlugin:
            return self.clone()

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Load the kernels on first use and set the sizes, so that `enqueue` only launches."""
            batch, _, height, width = tuple(inputs[1].dims)
            self._size = (batch, height, width)
            self._load()

        def _load(self) -> None:
            if self._step is None or self._loaded_tactic != self.tactic:
                self.destroy()
                images, device = self.tactics[self.tactic - 1], cuda.current_device()
                self._step = CellStep(self.cell, images, device, fp16_mirror=self.fp16_mirror)
                self._loaded_tactic = self.tactic
            assert self._size is not None
            self._step.resize(*self._size)

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self._step is None:  # a clone created after on_shape_change
                self.on_shape_change(input_desc, output_desc)
            assert self._step is not None
            self._step.run(inputs, outputs, workspace, stream)

        def destroy(self) -> None:
            step, self._step = self._step, None
            if step is not None:
                step.close()

        def get_fields_to_serialize(self) -> Any:
            # A collection only refers to the bytes, which must live as long as the plugin.
            if self._bytes is None:
                self._bytes = np.frombuffer(pack_fields(self.cell, self.images, fp16_mirror=self.fp16_mirror), np.int8)
            return trt.PluginFieldCollection([trt.PluginField(FIELDS, self._bytes, trt.PluginFieldType.INT8)])

    return CellPlugin
