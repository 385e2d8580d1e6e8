"""Cases of benchmarks/loop.py: models, frame sizes and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from stepcell.dims import bind, resolve
from stepcell.exporter import export_onnx, load_checkpoint, step_model
from stepcell.files import write_atomic
from stepcell.models import CellStack, ConvGRUCell
from stepcell.models.published.raft import BasicUpdateBlock
from stepcell.models.published.rvm import RecurrentDecoder
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
        shapes: shape of each input of a step.
        threads: number of threads for one step.
    """

    module: Any
    exported: Path
    wide: Path
    shapes: tuple[tuple[int, ...], ...]
    threads: int


@dataclass(frozen=True)
class Shape:
    """A model and the shape of its first input (batch, channels, height, width), from which the others follow."""

    name: str
    model: str
    frame: tuple[int, int, int, int]


SHAPES = [
    Shape("small cell", "ConvGRU 5 to 32", (16, 5, 8, 8)),  # the shape that pytorch-convgru-cell is timed with
    Shape("large cell", "ConvGRU 32 to 64", (1, 32, 64, 64)),
    Shape("larger cell", "ConvGRU 64 to 64", (1, 64, 128, 128)),
    Shape("denoiser 320x240", "denoiser", (1, 3, 240, 320)),
    Shape("decoder of RVM", "RVM decoder", (1, 3, 288, 512)),  # with the channels of its MobileNetV3
    Shape("update of RAFT", "RAFT update block", (1, 324, 32, 64)),  # for frames of 512x256
]


def zoo_denoiser() -> nn.Module:
    """The trained denoiser of the zoo."""
    return step_model(load_checkpoint(Path(denoiser.__file__).with_name("denoiser.safetensors")))[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ConvGRU 5 to 32": lambda: CellStack([ConvGRUCell(5, 32)]),
    "ConvGRU 32 to 64": lambda: CellStack([ConvGRUCell(32, 64)]),
    "ConvGRU 64 to 64": lambda: CellStack([ConvGRUCell(64, 64)]),
    "denoiser": zoo_denoiser,
    "RVM decoder": lambda: RecurrentDecoder([16, 24, 40, 128], [80, 40, 32, 16]),
    "RAFT update block": lambda: BasicUpdateBlock(324, 128),
}


def make_case(shape: Shape, folder: Path, threads: int) -> Case:
    """The module with weights that are exact in float16, and its float16 and float32 files."""
    torch.manual_seed(0)
    module: Any = MODELS[shape.model]().half().float().eval()
    exported, wide = folder / f"{shape.model}.onnx", folder / f"{shape.model}.float32.onnx"
    if not exported.exists():
        export_onnx(module, exported)
        write_atomic(wide, to_float32(onnx.load(str(exported))).SerializeToString())
    symbols = bind([(module.inputs[0].name, module.inputs[0].shape, shape.frame)])
    shapes = tuple(resolve(spec.shape, symbols) for spec in module.inputs)
    return Case(module, exported, wide, shapes, threads)
