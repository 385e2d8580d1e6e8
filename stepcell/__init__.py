"""stepcell: recurrent vision models as single-step ONNX files, TensorRT engines and a step loop.

Public names load on first use, so `import stepcell` imports neither numpy, onnx nor torch. Four more modules are
public: `stepcell.models` (torch modules), `stepcell.events` (event cameras), `stepcell.client` (streams on a server)
and `stepcell.errors`. Everything else may change without notice.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stepcell.lazy import lazy_names

if TYPE_CHECKING:
    from stepcell.contract import StateSpec, StepContract, TensorSpec
    from stepcell.errors import StepcellError
    from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint, load_checkpoint
    from stepcell.exporter.from_checkpoint.step_model import load_model, step_model
    from stepcell.exporter.from_module.lift import lift_states
    from stepcell.exporter.from_module.replacements import register_cell
    from stepcell.exporter.from_onnx.fuse import FuseReport, fuse
    from stepcell.exporter.quantize.quantize import quantize
    from stepcell.exporter.step_onnx.export import export_onnx
    from stepcell.nv12 import Nv12
    from stepcell.pixels import Pixels
    from stepcell.runtime.engine.build import EngineInfo, build_engine
    from stepcell.runtime.engine.options import BuildOptions
    from stepcell.runtime.loop.step_loop import StepLoop
    from stepcell.runtime.media.open_sink import open_sink
    from stepcell.runtime.media.open_source import open_source
    from stepcell.runtime.streams.report import RunError, RunReport
    from stepcell.runtime.streams.run import run_streams
    from stepcell.runtime.streams.run_control import RunControl

__version__ = "0.1.0"

__all__ = [
    "BuildOptions",
    "Checkpoint",
    "EngineInfo",
    "FuseReport",
    "Nv12",
    "Pixels",
    "RunControl",
    "RunError",
    "RunReport",
    "StateSpec",
    "StepContract",
    "StepLoop",
    "StepcellError",
    "TensorSpec",
    "build_engine",
    "export_onnx",
    "fuse",
    "lift_states",
    "load_checkpoint",
    "load_model",
    "open_sink",
    "open_source",
    "quantize",
    "register_cell",
    "run_streams",
    "step_model",
]

_NAMES = {
    "contract": "StateSpec StepContract TensorSpec",
    "errors": "StepcellError",
    "exporter.from_checkpoint.checkpoint": "Checkpoint load_checkpoint",
    "exporter.from_checkpoint.step_model": "load_model step_model",
    "exporter.from_module.lift": "lift_states",
    "exporter.from_module.replacements": "register_cell",
    "exporter.from_onnx.fuse": "FuseReport fuse",
    "exporter.quantize.quantize": "quantize",
    "exporter.step_onnx.export": "export_onnx",
    "nv12": "Nv12",
    "pixels": "Pixels",
    "runtime.engine.build": "EngineInfo build_engine",
    "runtime.engine.options": "BuildOptions",
    "runtime.loop.step_loop": "StepLoop",
    "runtime.media.open_sink": "open_sink",
    "runtime.media.open_source": "open_source",
    "runtime.streams.report": "RunError RunReport",
    "runtime.streams.run": "run_streams",
    "runtime.streams.run_control": "RunControl",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)

logging.getLogger(__name__).addHandler(logging.NullHandler())
