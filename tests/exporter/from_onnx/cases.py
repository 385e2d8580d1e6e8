"""ONNX files that exporters wrote from public code, one folder each.

A case holds `model.onnx`, `case.json` (the true state pairs and cells) and `io.npz` (inputs, initial
states, and what ONNX Runtime gave for every output, step by step). They lie in the folder named by
STEPCELL_ONNX, or beside the checkout; a few small ones are kept in `tests/data/onnx`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = ["KEPT", "RECORDED", "Case", "find_cases", "is_replaced"]

ROOT = Path(__file__).parent.parent.parent.parent
RECORDED = Path(os.environ.get("STEPCELL_ONNX", ROOT.parent / "shared" / "onnx"))
KEPT = ROOT / "tests" / "data" / "onnx"

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One file and its recorded run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.path / "case.json").read_text())  # type: ignore[no-any-return]

    @cached_property
    def arrays(self) -> dict[str, Array]:
        with np.load(self.path / "io.npz") as file:
            return {name: file[name] for name in file}

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path / "model.onnx")

    @property
    def pairs(self) -> dict[str, str]:
        return {pair["input"]: pair["output"] for pair in self.meta["state_pairs"]}

    @property
    def tolerance(self) -> float:
        """The float16 files are computed in part in float32 by ONNX Runtime's CPU provider."""
        return 3e-2 if self.meta["exporter"]["dtype"] == "float16" else 1e-4

    @property
    def states(self) -> dict[str, Array]:
        return {name: self.arrays[f"init_{name}"] for name in self.pairs}

    @property
    def frames(self) -> list[dict[str, Array]]:
        """The data inputs of every step."""
        names = [entry["name"] for entry in self.meta["data_inputs"]]
        constant = {name: self.arrays[f"const_{name}"] for name in names if f"const_{name}" in self.arrays}
        moving = {name: self.arrays[f"in_{name}"] for name in names if name not in constant}
        steps = len(next(iter(moving.values())))
        return [{**constant, **{name: array[step] for name, array in moving.items()}} for step in range(steps)]

    @property
    def expected(self) -> list[dict[str, Array]]:
        """What was recorded of every step: the data outputs, and at the last step the states."""
        steps = [{} for _ in self.frames]  # type: list[dict[str, Array]]
        for name in self.meta["data_outputs"]:
            for step, array in zip(steps, self.arrays[f"ort_{name}"], strict=True):
                step[name] = array
        steps[-1].update({name: self.arrays[f"ort_final_{name}"] for name in self.pairs.values()})
        return steps


def is_replaced(cell: dict[str, Any]) -> bool:
    """Whether an op computes a recorded cell; the records are older than some variants of the ops."""
    return cell["fusable"] != "no" or {"linear_before_reset", "peephole", "hard_gates"} & set(cell["needs"]) != set()


def find_cases(places: Sequence[Path] = (RECORDED, KEPT)) -> list[Case]:
    """Every case that lies in one of the places; of two with one name the first."""
    paths = [path.parent for place in places for path in sorted(place.glob("*/case.json"))]
    return [Case(path) for path in {path.name: path for path in reversed(paths)}.values()][::-1]
