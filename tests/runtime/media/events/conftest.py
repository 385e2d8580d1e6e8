"""An event model that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exported_models import exported_model


@pytest.fixture(scope="session")
def firenet_onnx(exported: Path) -> Path:
    """Random weights, float32; x (batch, 5, height, width), 0.35 events per pixel."""
    return exported_model("firenet", exported)
