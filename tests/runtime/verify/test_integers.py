"""Labels, masks and bytes in a verification and a comparison: what counts is the share of elements that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.runtime.verify.bound import forgetting
from stepcell.runtime.verify.clips import random_clip
from stepcell.runtime.verify.compare import compare_outputs
from stepcell.runtime.verify.growth import error_growth, growth_verdict
from stepcell.runtime.verify.measure import deviation
from stepcell.runtime.verify.stepper import FunctionStepper

SHAPE = ("batch", 1, 40, 50)
CONTRACT = StepContract(
    inputs=(TensorSpec(name="x", shape=SHAPE, layout="NCHW", range=(0.0, 1.0)),),
    outputs=(
        TensorSpec(name="labels", shape=SHAPE, dtype="int64", layout="NCHW"),
        TensorSpec(name="data", shape=SHAPE, dtype="uint8", layout="NCHW"),
    ),
    states=(StateSpec(name="h", shape=SHAPE),),
)


def stepper(*, labels_off: int = 0, levels: int = 0) -> FunctionStepper:
    """h' = 0.5 h + 0.5 x; five labels and bytes of it, wrong in so many labels and by so many levels."""

    def step(inputs: Any, states: Any) -> Any:
        h = 0.5 * states["h"] + 0.5 * inputs["x"]
        labels, data = np.int64(h * 5), np.uint8(h * 200)
        labels.flat[:labels_off] += 1
        return {"labels": labels, "data": data + np.uint8(levels)}, {"h": h}

    def jvp(inputs: Any, states: Any, tangents: Any) -> Any:
        outputs, new = step(inputs, states)
        return (
            outputs,
            new,
            {name: np.zeros(array.shape) for name, array in outputs.items()},
            {"h": 0.5 * tangents["h"]},
        )

    return FunctionStepper(step, CONTRACT, "test", jvp=jvp, wide=True)


@pytest.mark.parametrize(
    ("wrong", "passes", "says"),
    [
        ({"levels": 1}, True, ""),
        ({"levels": 2}, False, "data at step 1: 100.00% of the elements differ"),
        ({"labels_off": 1}, True, "labels at step 1: 0.05% of the elements differ"),
        ({"labels_off": 100}, False, "labels at step 1: 5.00% of the elements differ"),
    ],
    ids=str,
)
def test_a_share_may_differ(wrong: dict[str, int], passes: bool, says: str) -> None:
    clip = random_clip(CONTRACT, {"batch": 1}, count=8)
    growth = error_growth(stepper(**wrong), stepper(), clip, 8)
    verdict = growth_verdict(growth, stepper(**wrong), peer=None)
    assert verdict.passed is passes
    assert says in verdict.says
    assert {each.name: each.is_share for each in growth} == {"labels": True, "data": True, "h": False}
    if wrong == {"levels": 1}:
        assert growth[1].max_abs == (1.0,) * 4
        assert growth[1].rms == (0.0,) * 4
    tolerant = growth_verdict(growth, stepper(**wrong), peer=None, tolerance=0.06)
    assert tolerant.passed is (wrong != {"levels": 2})


def test_there_is_no_bound_of_labels() -> None:
    exact = stepper()
    clip = random_clip(CONTRACT, {"batch": 1}, count=8)
    states = {"h": np.zeros((1, 1, 40, 50))}
    assert forgetting(exact, clip, states, 8).gains == {}


def test_bytes_do_not_wrap_around() -> None:
    assert deviation(np.uint8([0, 10]), np.uint8([255, 11])) == (255.0, 0.5)
    assert deviation(np.array([True, False]), np.array([True, True])) == (1.0, 0.5)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64"])
def test_compare_says_the_share_that_differs(tmp_path: Path, dtype: str) -> None:
    a = np.zeros((4, 10, 10), dtype)
    b = a.copy()
    b[:, 0] = 1
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    found = compare_outputs(tmp_path / "a.npy", tmp_path / "b.npy")
    assert (found.differing, found.worst) == (0.1, 1.0)
    np.save(tmp_path / "c.npy", a.astype(np.float32))
    assert compare_outputs(tmp_path / "a.npy", tmp_path / "c.npy").differing is None
