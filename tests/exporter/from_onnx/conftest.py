"""A network as users export and adopt it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepcell.exporter.from_onnx.fuse import FuseReport, fuse

Adopt = Callable[..., FuseReport]


@pytest.fixture
def adopt(tmp_path: Path) -> Adopt:
    """Export a module as TorchScript's exporter does, and fuse the file; the files are `a.onnx` and `b.onnx`."""
    torch.manual_seed(0)

    def run(
        net: nn.Module, inputs: Mapping[str, Tensor], outputs: str, dynamic: Any = None, **options: Any
    ) -> FuseReport:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            net.eval(),
            tuple(inputs.values()),
            str(tmp_path / "a.onnx"),
            input_names=list(inputs),
            output_names=outputs.split(),
            dynamic_axes=dynamic,
            opset_version=12,
            dynamo=False,
        )
        return fuse(tmp_path / "a.onnx", tmp_path / "b.onnx", **options)

    return run
