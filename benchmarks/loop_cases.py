"""Cases of benchmarks/loop.py: models, frame sizes and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from stepcell.exporter import export_onnx, load_checkpoint, step_model
from stepcell.files import write_atomic
from stepcell.models import CellStack, ConvGRUCell
from stepcell.models.zoo import denoiser
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32

__all__ = ["SHAPES", "Case", "Shape", "make_case"]


@dataclass(frozen=True)
class Case:
    """A model with a frame size.

    Attributes:
        module: a step model whose float32 weights are exact in float16, so that both files have the same weights.
        exported: the file that `stepcell export` writes by default, in float16.
        wide: the same in float32, as StepLoop runs it on a CPU; for the other loops.
        shape: shape of a frame (batch, channels, height, width).
        threads: number of threads for one step.
    """

    module: Any
    exported: Path
    wide: Path
    shape: tuple[int, ...]
    threads: int


@dataclass(frozen=True)
class Shape:
    """A model and the shape of its frames (batch, channels, height, width)."""

    name: str
    model: str
    frame: tuple[int, int, int, int]


SHAPES = [
    Shape("small cell", "ConvGRU 5 to 32", (16, 5, 8, 8)),  # the shape that pytorch-convgru-cell is timed with
    Shape("large cell", "ConvGRU 32 to 64", (1, 32, 64, 64)),
    Shape("denoiser 176x144", "denoiser", (1, 3, 144, 176)),
    Shape("denoiser 320x240", "denoiser", (1, 3, 240, 320)),
]


def zoo_denoiser() -> nn.Module:
    """The trained denoiser of the zoo."""
    return step_model(load_checkpoint(Path(denoiser.__file__).with_name("denoiser.safetensors")))[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ConvGRU 5 to 32": lambda: CellStack([ConvGRUCell(5, 32)]),
    "ConvGRU 32 to 64": lambda: CellStack([ConvGRUCell(32, 64)]),
    "denoiser": zoo_denoiser,
}


def make_case(shape: Shape, folder: Path, threads: int) -> Case:
    """The module with weights that are exact in float16, and its float16 and float32 files."""
    torch.manual_seed(0)
    module = MODELS[shape.model]().half().float().eval()
    exported, wide = folder / f"{shape.model}.onnx", folder / f"{shape.model}.float32.onnx"
    if not exported.exists():
        export_onnx(module, exported)
        write_atomic(wide, to_float32(onnx.load(str(exported))).SerializeToString())
    return Case(module, exported, wide, shape.frame, threads)
