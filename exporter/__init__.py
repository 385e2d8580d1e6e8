"""Exporting: trained checkpoint -> canonical step model -> checked single-step ONNX file."""

from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint, load_checkpoint
from stepcell.exporter.from_checkpoint.families.registry import FAMILIES, find_family
from stepcell.exporter.from_checkpoint.step_model import load_model, step_model
from stepcell.exporter.from_module import register_cell
from stepcell.exporter.step_onnx.export import export_onnx

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "export_onnx",
    "find_family",
    "load_checkpoint",
    "load_model",
    "register_cell",
    "step_model",
]
