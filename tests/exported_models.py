"""Exported models that several tests share: each is exported once per test run.

`python -m tests.exported_models FOLDER` exports them all; with STEPCELL_TEST_MODELS=FOLDER tests take them from there,
so that tests of the runtime run where torch is not installed.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepcell.models import CellStack
    from stepcell.models.published.e2vid import FireNet
    from stepcell.models.zoo.denoiser import Denoiser


def denoiser() -> Denoiser:
    """A small denoiser with random weights: state h (batch, 8, height // 2, width // 2)."""
    import torch

    from stepcell.models.zoo.denoiser import Denoiser

    torch.manual_seed(0)
    return Denoiser(hidden=8).eval()


def stack() -> CellStack:
    """A ConvGRU below a ConvLSTM: states h0, h1, c1; x (batch, 3, height, width)."""
    import torch

    from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell

    torch.manual_seed(0)
    return CellStack([ConvGRUCell(3, 6), ConvLSTMCell(6, 4, (1, 5))])


def learned() -> CellStack:
    """A ConvGRU below a ConvLSTM whose states do not start at zero: h0 per channel, c1 one value for all."""
    import torch

    from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell

    torch.manual_seed(0)
    stack = CellStack([ConvGRUCell(3, 6), ConvLSTMCell(6, 4)])
    stack.initial = {"h0": torch.linspace(-0.5, 0.5, 6).reshape(6, 1, 1), "c1": torch.full((1, 1, 1), 0.7)}
    return stack


def firenet() -> FireNet:
    """A model of events with random weights: x (batch, 5, height, width), 0.35 events a pixel."""
    import torch

    from stepcell.models.published.e2vid import FireNet

    torch.manual_seed(0)
    return FireNet(5, 8).eval()


# File name -> module and arguments of export_onnx. float16 compute, float32 states and dynamic sizes by default.
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "denoiser": (denoiser, {"family": "denoiser"}),
    "denoiser32": (denoiser, {"family": "denoiser", "precision": "float32"}),
    "denoiser_fixed": (denoiser, {"family": "denoiser", "shapes": {"x": (1, 3, 64, 96)}}),
    "stack": (stack, {"family": "stack"}),
    "learned": (learned, {"precision": "float32"}),
    "firenet": (firenet, {"family": "e2vid_firenet", "precision": "float32"}),
}


def exported_model(name: str, folder: Path) -> Path:
    """The file of a model, exported where it is not there yet; several processes may share the folder.

    Raises:
        ModuleNotFoundError: it is not there, and torch is not installed.
    """
    path = folder / f"{name}.onnx"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            from stepcell.exporter import export_onnx

            make, options = MODELS[name]
            export_onnx(make(), path, **options)
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        print(exported_model(name, folder))
