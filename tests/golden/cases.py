"""Golden cases: recorded runs of public implementations, and their comparison with exported files.

A case is a folder FAMILY/CASE with `checkpoint.pth` (upstream's state_dict), `io.npz` (inputs, states
and outputs in float32; outputs in float64 as `NAME_f64`) and `case.json` (constructor, layouts, resets,
tolerance); docs/adding-a-family.md describes the fields. All recorded cases are in the folder that the
environment variable STEPCELL_GOLDEN names; a small case of most families is in `tests/data/golden`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from stepcell import StepContract, StepLoop
from stepcell.errors import StepcellError
from stepcell.exporter import export_onnx, find_family, load_checkpoint, step_model
from stepcell.renamed_families import current_name
from stepcell.runtime.verify.references import as_written
from stepcell.runtime.verify.stepper import LoopStepper, Running

__all__ = ["KEPT", "RECORDED", "ROOT", "Case", "exported", "find_cases", "worst_error"]

ROOT = Path(__file__).parent.parent.parent
RECORDED = Path(os.environ.get("STEPCELL_GOLDEN", ROOT.parent / "shared" / "golden"))
KEPT = ROOT / "tests" / "data" / "golden"
PLACES = (RECORDED, KEPT)

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One recorded run.

    Attributes:
        path: its folder; the name of the parent folder is the family's name or former name.
    """

    path: Path

    @property
    def family(self) -> str:
        return current_name(self.path.parent.name)

    @property
    def name(self) -> str:
        return f"{self.family}/{self.path.name}"

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.path / "case.json").read_text())  # type: ignore[no-any-return]

    @cached_property
    def arrays(self) -> dict[str, Array]:
        with np.load(self.path / "io.npz") as file:
            return {name: file[name] for name in file}

    @property
    def tolerance(self) -> float:
        return float(self.meta["suggested_atol_float32"])

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for `--set`: those of upstream's constructor and of the run."""
        known = find_family(self.family).settings
        return {**self.meta["constructor"], **{k: v for k, v in self.meta["run_options"].items() if k in known}}

    @property
    def inputs(self) -> dict[str, tuple[Array, bool]]:
        """Each input, time axis first if it has one, and whether it has one."""
        found = {}
        for name, array in self.meta["arrays"].items():
            if array["role"] == "input":
                found[name] = (self._time_first(name, array["layout"]), "T" in array["layout"])
        return found

    @property
    def steps(self) -> int:
        lengths = [a["shape"][a["layout"].index("T")] for a in self.meta["arrays"].values() if "T" in a["layout"]]
        return max(lengths)

    @property
    def resets(self) -> dict[int, list[bool]]:
        """Rows to reset before each step; in upstream's masks 1 means keep."""
        return {event["before_step"]: [not keep for keep in event["mask"]] for event in self.meta["events"]}

    def states(self, kind: str) -> dict[str, Array]:
        """`init` or `final` states by name; a state of all layers (L, B, F) is split into one per layer."""
        found = {}
        for key, array in self.meta["arrays"].items():
            if key.startswith(f"{kind}_") and not key.endswith("_f64") and "state" in array["role"]:
                name = key.removeprefix(f"{kind}_")
                value = self.arrays[key + "_f64"] if key + "_f64" in self.arrays else self.arrays[key]
                if array["layout"] == "LBF":
                    found.update({f"{name}{layer}": value[layer] for layer in range(len(value))})
                else:
                    found[name] = value
        return found

    def expected(self, name: str) -> Array:
        """An output in float64, time first; it may hold the last steps only."""
        last = f"final_{name}"  # an output that was recorded for the last step only
        key = name if name in self.arrays else last
        if key + "_f64" in self.arrays:
            key += "_f64"
        array = self._time_first(key, self.meta["arrays"][key]["layout"])
        return array[None] if key.startswith(last) else array

    def _time_first(self, name: str, layout: str) -> Array:
        array = self.arrays[name]
        return np.moveaxis(array, layout.index("T"), 0) if "T" in layout else array


def find_cases(family: str | None = None, places: Sequence[Path] = PLACES) -> list[Case]:
    """All cases of a family, or of all families, in these folders."""
    paths = [path for place in places for path in sorted(place.glob("*/*/case.json"))]
    return [case for case in map(Case, (path.parent for path in paths)) if family in (None, case.family)]


def exported(
    case: Case, folder: Path, precision: str = "float32", change: Callable[[nn.Module], None] = lambda _: None
) -> Path:
    """The case's checkpoint as a file of `folder`.

    Args:
        change: applied to the step model before the export, to show that a mistake is detected.
    """
    model, _, _ = step_model(load_checkpoint(case.path / "checkpoint.pth"), case.family, case.settings)
    change(model)
    path = folder / f"{case.path.name}-{precision}.onnx"
    export_onnx(model, path, precision=precision, family=case.family)  # type: ignore[arg-type]
    return path


def worst_error(case: Case, path: Path, precision: str = "float32") -> dict[str, float]:
    """Run the case's exported file over the recorded frames and compare.

    Returns:
        Largest absolute difference to upstream in float64, over all steps, per output and state.
    """
    worst: dict[str, float] = {}

    def compare(name: str, got: Array, truth: Array) -> None:
        assert got.shape == truth.shape, f"{case.name}: {name}: got {got.shape}, upstream has {truth.shape}"
        worst[name] = max(worst.get(name, 0.0), float(np.abs(got.astype(np.float64) - truth).max()))

    with _opened(path, precision) as (contract, run):
        missing = {spec.name for spec in contract.inputs} - set(case.inputs)
        zeros = {spec.name: _zeros(spec.shape, case) for spec in contract.inputs if spec.name in missing}
        if initial := case.states("init"):
            run.load(initial)
        for step in range(case.steps):
            if step in case.resets:
                run.reset(case.resets[step])
            frame = {name: (array[step] if moving else array) for name, (array, moving) in case.inputs.items()}
            assert set(frame) | set(zeros) == {spec.name for spec in contract.inputs}
            outputs, finals = run.step({**frame, **zeros})
            for spec in contract.outputs:
                truth = case.expected(spec.name)
                if (index := step - case.steps + len(truth)) >= 0:
                    compare(spec.name, outputs[spec.name], truth[index])
    for name, truth in case.states("final").items():
        if name in {spec.name for spec in contract.outputs}:
            continue
        if name not in finals:
            raise StepcellError(f"{case.name}: no state {name}; the model has {', '.join(finals)}")
        compare(name, finals[name], truth)
    return worst


@contextmanager
def _opened(path: Path, precision: str) -> Iterator[tuple[StepContract, Running]]:
    """The file in StepLoop, or in float16 as it is written, which ONNX Runtime on a CPU does not compute."""
    if precision == "float16":
        stepper = as_written(path)
        yield stepper.contract, stepper.run()
        return
    with StepLoop.open(path, check_finite=False) as loop:
        yield loop.contract, LoopStepper(loop).run()


def _zeros(shape: tuple[Any, ...], case: Case) -> Array:
    """Input of a case that was recorded without one; upstream feeds zeros then."""
    batch, *_, height, width = next(iter(case.states("final").values())).shape
    sizes = {"batch": batch, "height": height, "width": width}
    return np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in shape], np.float32)
