"""Which of ncnn and ONNX Runtime steps a model, and what is remembered of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepcell import StepLoop
from stepcell.errors import StepcellError, UsageError
from stepcell.runtime.backends.ncnn import trial

pytestmark = pytest.mark.skipif(find_spec("ncnn") is None, reason="the package ncnn is not installed")
X = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STEPCELL_BACKEND", "auto")
    return tmp_path / "cache" / "stepcell" / "backends"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trial finds, and how many there were."""
    found: dict[str, Any] = {"speedup": 2.0, "difference": 0.0, "trials": 0}

    def difference(*_: Any) -> Any:
        found["trials"] += 1
        return found["difference"]

    monkeypatch.setattr(trial, "difference", difference)
    monkeypatch.setattr(trial, "speedup", lambda *_: found["speedup"])
    return found


def stepped(path: Path, x: Any = X, **options: Any) -> str:
    """The back end that steps a model."""
    with StepLoop.open(path, threads=1, **options) as loop:
        loop.step(x=x)
        return loop.description.split()[0]


def test_the_faster_one_is_chosen_and_told(
    accumulator: Callable[..., Path], measured: dict[str, Any], logged: pytest.LogCaptureFixture
) -> None:
    path = accumulator()
    assert stepped(path) == "ncnn"
    assert "runs in ncnn: ncnn takes 0.50 of ONNX Runtime's time for a step of these sizes, measured just now" in (
        logged.text
    )
    measured["speedup"] = 0.8
    assert stepped(path, X[:, :, :4]) == "ONNX"  # sizes of their own
    assert "runs in ONNX Runtime: ncnn takes 1.25 of" in logged.text
    assert measured["trials"] == 2


def test_a_verdict_is_remembered(
    accumulator: Callable[..., Path], measured: dict[str, Any], cache: Path, logged: pytest.LogCaptureFixture
) -> None:
    path = accumulator()
    assert [stepped(path), stepped(path)] == ["ncnn", "ncnn"]
    assert measured["trials"] == 1
    assert "as measured before" in logged.text
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["verdict"] == {"difference": 0.0, "speedup": 2.0}
    stepped(path, np.concatenate([X, X]))  # another number of streams
    with StepLoop.open(path, threads=2) as loop:
        loop.step(x=X)
    assert measured["trials"] == 3
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 100, b'{"key": 1}'])
def test_a_damaged_verdict_is_made_anew(
    accumulator: Callable[..., Path], measured: dict[str, Any], cache: Path, damage: bytes
) -> None:
    path = accumulator()
    stepped(path)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert stepped(path) == "ncnn"
    assert measured["trials"] == 2
    assert file.read_bytes() == whole


def test_a_verdict_about_something_else_does_not_count(
    accumulator: Callable[..., Path], measured: dict[str, Any], cache: Path
) -> None:
    path = accumulator()
    stepped(path)
    (file,) = cache.iterdir()
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 7'))
    stepped(path)
    assert measured["trials"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(
    accumulator: Callable[..., Path], measured: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    path = accumulator()
    assert [stepped(path), stepped(path)] == ["ncnn", "ncnn"]
    assert measured["trials"] == 2


def test_a_file_in_the_place_of_the_folder(
    accumulator: Callable[..., Path], measured: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("mine")
    assert stepped(accumulator()) == "ncnn"
    assert (tmp_path / "cache").read_text() == "mine"


def test_results_that_differ_are_not_used(
    accumulator: Callable[..., Path], measured: dict[str, Any], logged: pytest.LogCaptureFixture
) -> None:
    path = accumulator()
    measured["difference"] = 3e-4
    assert [stepped(path), stepped(path)] == ["ONNX", "ONNX"]
    assert "differ from ONNX Runtime's by 3.0e-04 of the largest value" in logged.text
    assert measured["trials"] == 1
    with pytest.raises(StepcellError, match="differ from ONNX Runtime's"):
        stepped(path, backend="ncnn")


def test_a_model_that_ncnn_cannot_compute(accumulator: Callable[..., Path], logged: pytest.LogCaptureFixture) -> None:
    path = accumulator(dtype="int32")
    x = np.ones((1, 3, 4, 4), np.int32)
    assert stepped(path, x) == "ONNX"
    assert "runs in ONNX Runtime: ncnn cannot compute this model: state h: of type int32" in logged.text
    with pytest.raises(UsageError, match="of type int32"):
        stepped(path, x, backend="ncnn")


def test_asked_for_by_name(accumulator: Callable[..., Path], measured: dict[str, Any], monkeypatch: Any) -> None:
    path = accumulator()
    measured["speedup"] = 0.1
    assert stepped(path, backend="ncnn") == "ncnn"
    assert stepped(path) == "ONNX"  # how fast it is was not measured before
    assert measured["trials"] == 2
    monkeypatch.setenv("STEPCELL_BACKEND", "ncnn")
    assert [stepped(path), stepped(path, backend="onnxruntime")] == ["ncnn", "ONNX"]
    monkeypatch.setenv("STEPCELL_BACKEND", "fast")
    with pytest.raises(UsageError, match="STEPCELL_BACKEND: expected auto, onnxruntime, ncnn, got 'fast'"):
        stepped(path)


def test_a_real_trial_finds_a_wrong_network(denoiser_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepcell.runtime.backends.ncnn.operators import elementwise

    x = np.random.default_rng(0).random((1, 3, 32, 48), np.float32)
    assert stepped(denoiser_onnx, x, backend="ncnn") == "ncnn"
    monkeypatch.setitem(elementwise._ACTIVATIONS, "Tanh", ("Sigmoid", {}))
    with pytest.raises(StepcellError, match=r"differ from ONNX Runtime's by \d.\de[+-]0[0-3]"):
        stepped(denoiser_onnx, x, backend="ncnn")


def test_states_start_over_after_a_trial(accumulator: Callable[..., Path]) -> None:
    path = accumulator()
    for backend in ("ncnn", "auto"):
        with StepLoop.open(path, threads=1, backend=backend) as loop:
            np.testing.assert_array_equal(loop.step(x=X)["y"], X)
            np.testing.assert_array_equal(loop.step(x=X)["y"], 2 * X)


class Clock:
    """Time that passes in steps alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def backend(self, seconds: float) -> Any:
        """A back end of which a step takes that time."""

        def step(_: Any) -> None:
            self.now += seconds

        return SimpleNamespace(step=step, contract=SimpleNamespace(inputs=()))


def test_a_trial_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(trial, "settle", lambda _: None)
    quick, slow = clock.backend(0.002), clock.backend(0.004)
    assert trial.speedup(slow, quick, {}, 0.8) == pytest.approx(2)
    assert 0.8 < clock.now < 0.9
    assert trial.speedup(quick, slow, {}, 0.8) == pytest.approx(0.5)
    clock.now = 0.0
    assert trial.speedup(clock.backend(1), clock.backend(2), {}, 0.8) == pytest.approx(0.5)
    assert clock.now == 4  # of slow models one round is made, without cold steps


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, "GOMP_SPINCOUNT = '1000'"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
    ],
)
def test_threads_that_wait_soon_sleep(given: dict[str, str], shown: str) -> None:
    """As the OpenMP library says itself; the environment of the program stays as it was."""
    code = "import os; from stepcell.runtime.backends.ncnn.net import load_ncnn; load_ncnn(); "
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown in done.stderr
    assert done.stdout.strip() == str(given.get("GOMP_SPINCOUNT"))
