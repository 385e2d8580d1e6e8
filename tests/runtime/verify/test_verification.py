"""The verdicts on small cells: what stalls fails, what is only rounded passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepcell.contract import StepContract
from stepcell.runtime.verify.clips import Clip
from stepcell.runtime.verify.results import Verdict, failed
from stepcell.runtime.verify.stepper import Arrays
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
    assert "add up to" in named(found, "prediction").says
    assert named(found, "prediction").passed
    assert named(found, "storage").passed


def running_mean(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
    """m' = m + (x - m) / n', n' = n + 1: whole numbers of no rounding, in any float type that holds them."""
    n = states["n"] + 1
    m = states["m"] + (inputs["x"] - states["m"]) / n
    return {"y": inputs["x"] - m}, {"m": m, "n": n}


MEAN = {"m": ("batch", 32), "n": ("batch", 1)}


def test_a_counter_in_float32_is_stored_wide_and_alive() -> None:
    found = look(running_mean, MEAN, "float32", constant=False)
    assert not failed(found.verdicts)
    assert "n" not in named(found, "precision").subjects
    assert "the smallest effect" in named(found, "liveness").says
    assert {each.name: each.dtype for each in found.storage} == {"m": "float32", "n": "float32"}
    assert found.bound is not None
    assert found.bound.rms["n"] == 0, "no step rounds it, and no other state reaches it"
    assert found.bound.rms["m"] > 0


def test_a_counter_in_float16_stops_at_2048_and_stays_alive() -> None:
    found = look(running_mean, MEAN, "float16", constant=False)
    assert {verdict.name for verdict in found.verdicts if verdict.passed is False} == {"storage", "prediction"}
    assert "n stalls in float16" in named(found, "storage").says
    bound = named(found, "bound")
    assert bound.passed is None
    assert "what was changed in the states stays" in bound.says


def test_a_counter_that_float32_keeps_and_float16_computes_is_narrow() -> None:
    spec = contract(MEAN)
    subject = stored(running_mean, spec, np.float16)
    found = verify(subject, Reference(exact(running_mean, spec)), clip_of(spec), VerifyOptions())
    assert {each.name: each.dtype for each in found.storage} == {"m": "float16", "n": "float16"}


def test_a_bound_above_the_signal_proves_nothing() -> None:
    """Nearly nothing is forgotten: an error as large as the signal may not pass as within the bound."""
    off = 0.9

    def wrong(inputs: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
        outputs, new = slow_memory(0.0005)(inputs, states)
        return {"y": outputs["y"] + outputs["y"].dtype.type(off)}, {"h": new["h"] + new["h"].dtype.type(0.01)}

    function, spec = slow_memory(0.0005), contract(H)
    found = verify(stored(wrong, spec), Reference(exact(function, spec)), clip_of(spec), VerifyOptions())
    assert found.bound is not None
    assert found.bound.rms["y"] > 10, "the errors of single steps allow it"
    assert named(found, "bound").passed is None
    assert "larger than" in named(found, "bound").says
    assert named(found, "growth").passed is False
