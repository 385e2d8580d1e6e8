"""An event model that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepcell.exporter import export_onnx
from stepcell.models.published.e2vid import FireNet


@pytest.fixture(scope="session")
def firenet_onnx(exported: Path) -> Path:
    """Random weights, float32; x (batch, 5, height, width), 0.35 events per pixel."""
    torch.manual_seed(0)
    export_onnx(FireNet(5, 8).eval(), exported / "firenet.onnx", precision="float32", family="e2vid_firenet")
    return exported / "firenet.onnx"
