"""The verdicts on small cells: what stalls fails, what is only rounded passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepcell.contract import StepContract
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.results import Verdict, failed
from stepcell.runtime.verify.verification import Findings, Reference, VerifyOptions, verify
from tests.runtime.verify.cells import Function, contract, counting_lstm, exact, gru, slow_memory, stored


def clip_of(spec: StepContract, frames: int = 32, *, constant: bool = False) -> Clip:
    rng = np.random.default_rng(0)
    shape = (1, int(spec.inputs[0].shape[1]))
    first = rng.uniform(0.2, 1, shape)
    return Clip([{"x": (first if constant else rng.uniform(0, 1, shape)).astype("f4")} for _ in range(frames)], "test")


def look(function: Function, states: dict[str, Any], dtype: str, *, constant: bool = True, **options: Any) -> Findings:
    spec = contract(states, dtype=dtype)
    clip = clip_of(spec, constant=constant)
    return verify(stored(function, spec), Reference(exact(function, spec)), clip, VerifyOptions(**options))


def named(found: Findings, name: str) -> Verdict:
    return next(verdict for verdict in found.verdicts if verdict.name == name)


H = {"h": ("batch", 32)}
SLOW = {
    "slow memory": (slow_memory(0.001), H),
    "lstm that counts": (counting_lstm, {"h": ("batch", 32), "c": ("batch", 32)}),
    "gru with small gates": (gru(bias=-6.5), H),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_state_in_float16_fails_within_sixteen_warm_steps(name: str) -> None:
    function, states = SLOW[name]
    found = look(function, states, "float16", steps=16, window=16)
    for verdict in found.verdicts:
        print(verdict.name, verdict.passed, verdict.value, verdict.says)
    assert not named(found, "storage").passed
    assert "stalls" in named(found, "storage").says
    assert not named(found, "prediction").passed


@pytest.mark.parametrize("name", SLOW)
def test_the_same_state_in_float32_passes_ten_thousand_steps(name: str) -> None:
    function, states = SLOW[name]
    found = look(function, states, "float32", steps=10_000, window=16, still=2048)
    for verdict in found.verdicts:
        print(verdict.name, verdict.passed, verdict.value, verdict.says)
    assert not failed(found.verdicts)


@pytest.mark.parametrize("constant", [True, False])
def test_a_float16_state_with_fast_gates_passes(constant: bool) -> None:
    function = gru()
    found = look(function, H, "float16", constant=constant, steps=100)
    for verdict in found.verdicts:
        print(verdict.name, verdict.passed, verdict.value, verdict.says)
    assert "defect" in named(found, "prediction").says
    assert named(found, "prediction").passed
    assert named(found, "storage").passed
