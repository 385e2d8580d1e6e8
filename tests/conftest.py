"""Models and clips that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.models.zoo.clips import HELD_OUT
from stepcell.models.zoo.clips import clip_path as find_clip
from stepcell.models.zoo.denoiser import Denoiser


@pytest.fixture(scope="session")
def denoiser() -> Denoiser:
    """A small denoiser with random weights: state h (batch, 8, height // 2, width // 2)."""
    torch.manual_seed(0)
    return Denoiser(hidden=8).eval()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of exported models, each exported once per test run."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def denoiser_onnx(exported: Path, denoiser: Denoiser) -> Path:
    """float16 compute, float32 state, dynamic batch, height and width."""
    path = exported / "denoiser.onnx"
    export_onnx(denoiser, path, family="denoiser")
    return path


@pytest.fixture(scope="session")
def denoiser_onnx_float32(exported: Path, denoiser: Denoiser) -> Path:
    """float32, dynamic batch, height and width."""
    path = exported / "denoiser32.onnx"
    export_onnx(denoiser, path, precision="float32", family="denoiser")
    return path


@pytest.fixture(scope="session")
def denoiser_onnx_fixed(exported: Path, denoiser: Denoiser) -> Path:
    """float16, fixed at 1x3x64x96."""
    path = exported / "denoiser_fixed.onnx"
    export_onnx(denoiser, path, shapes={"x": (1, 3, 64, 96)}, family="denoiser")
    return path


@pytest.fixture(scope="session")
def stack_onnx(exported: Path) -> Path:
    """A ConvGRU below a ConvLSTM, float16: states h0, h1, c1; x (batch, 3, height, width)."""
    torch.manual_seed(0)
    path = exported / "stack.onnx"
    export_onnx(CellStack([ConvGRUCell(3, 6), ConvLSTMCell(6, 4, (1, 5))]), path, family="stack")
    return path


@pytest.fixture(scope="session")
def clip_path() -> Path:
    """A real clip, 176x144, 120 frames, that no model was trained on."""
    return find_clip(HELD_OUT)
