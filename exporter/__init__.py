"""Exporting: trained checkpoint -> canonical step model -> checked single-step ONNX file."""

from stepcell.exporter.adopt import register_cell
from stepcell.exporter.checkpoint import Checkpoint, load_checkpoint
from stepcell.exporter.export import export_onnx
from stepcell.exporter.families import FAMILIES, step_model

__all__ = ["FAMILIES", "Checkpoint", "export_onnx", "load_checkpoint", "register_cell", "step_model"]
