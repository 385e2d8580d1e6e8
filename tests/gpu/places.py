"""Back ends that the tests on a device compare: how each opens a model, and its tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions

SHAPE = (2, 3, 64, 96)
SLOTS = 3
# float16 compute against the float32 form of the same weights, over all steps (outputs and states
# of the small denoiser lie in about -1 to 2).
TOLERANCE = {"cpu": 0.0, "cpu-ncnn": 2e-5, "cuda-onnx": 2e-2, "cuda-engine": 2e-2}


class Place:
    """Opens a model on one back end."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.device = kind.partition("-")[0]
        self.options: dict[str, Any] = {"backend": "ncnn", "threads": 1} if kind == "cpu-ncnn" else {}

    def open(self, onnx: Path, *, slots: int | None = None) -> StepLoop:
        path = onnx
        if self.kind == "cuda-engine":
            path = self.folder / f"{onnx.stem}.engine"
            if not path.exists():
                one, many = (1, *SHAPE[1:]), (SLOTS, *SHAPE[1:])
                options = BuildOptions(min_shapes={"x": one}, opt_shapes={"x": SHAPE}, max_shapes={"x": many})
                build_engine(onnx, path, options)
        loop = StepLoop.open(path, device=self.device, slots=slots, **self.options)
        print(loop.description)
        return loop


def frames(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def worst(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
