"""Exporting: checkpoint, module or ONNX file -> checked single-step ONNX file with explicit states."""

from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint, load_checkpoint
from stepcell.exporter.from_checkpoint.families.registry import FAMILIES, find_family
from stepcell.exporter.from_checkpoint.step_model import load_model, step_model
from stepcell.exporter.from_module.lift import lift_states
from stepcell.exporter.from_module.replacements import register_cell
from stepcell.exporter.from_onnx.fuse import FuseReport, fuse
from stepcell.exporter.step_onnx.export import export_onnx

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "FuseReport",
    "export_onnx",
    "find_family",
    "fuse",
    "lift_states",
    "load_checkpoint",
    "load_model",
    "register_cell",
    "step_model",
]
