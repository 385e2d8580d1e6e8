"""Exporting: trained checkpoint -> canonical step model -> checked single-step ONNX file."""

from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint, load_checkpoint
from stepcell.exporter.from_checkpoint.families import FAMILIES, step_model
from stepcell.exporter.from_module import register_cell
from stepcell.exporter.step_onnx.export import export_onnx

__all__ = ["FAMILIES", "Checkpoint", "export_onnx", "load_checkpoint", "register_cell", "step_model"]
