"""A step that does not return, after others that did: ended in ONNX Runtime, or else with the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from stepcell import StepLoop
from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.errors import DeviceError, StepcellError, UsageError
from stepcell.limits import STEP_SECONDS
from stepcell.runtime.streams import watchdog
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl

SHAPE = (1, 3, 4, 4)


@pytest.fixture
def model(write_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Black frames take one iteration of a loop, white ones as many as take minutes."""
    picture = {"shape": SHAPE, "dtype": "float32", "layout": "NCHW", "range": (0.0, 1.0)}
    contract = StepContract(
        inputs=(TensorSpec(name="x", **picture),),
        outputs=(TensorSpec(name="y", **picture),),
        states=(StateSpec(name="h", shape=SHAPE, dtype="float32", batch_axis=0),),
    )
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Neg", ["v"], ["w"])],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, SHAPE)],
        [info("d", TensorProto.BOOL, []), info("w", TensorProto.FLOAT, SHAPE)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["max"], keepdims=0),
        helper.make_node("Mul", ["max", "many"], ["times"]),
        helper.make_node("Cast", ["times"], ["count"], to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "true", "x"], ["y"], body=body),
        helper.make_node("Identity", ["state_in.h"], ["state_out.h"]),
    ]
    weights = [
        helper.make_tensor("many", TensorProto.FLOAT, [], [1e8]),
        helper.make_tensor("true", TensorProto.BOOL, [], [1]),
    ]
    return write_model(tmp_path / "model.onnx", contract, nodes, initializer=weights)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = np.zeros((5, 4, 4, 3), np.uint8)
    frames[3] = 255
    np.save(tmp_path / "clip.npy", frames)
    return tmp_path / "clip.npy"


def test_it_is_ended_and_named_and_the_frames_before_it_are_kept(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STEP_SECONDS.name, "0.5")
    with pytest.raises(RunError) as failed:
        run_streams(model, str(clip), tmp_path / "out.npy")
    error = failed.value
    assert error.exit_code == 6
    assert "model.onnx: step 4 has not returned for 0.5 seconds" in error.message
    assert "clip.npy: frame 3" in error.message
    assert f"{STEP_SECONDS.name}=5 " in str(error.hint)
    assert len(np.load(tmp_path / "out.npy")) == error.report.streams[0].frames == 3
    for thread in (each for each in threading.enumerate() if each.name == "watchdog"):
        thread.join(5)
        assert not thread.is_alive()


def test_the_loop_can_go_on_afterwards(model: Path) -> None:
    black, white = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    with StepLoop.open(model) as loop:
        loop.step(x=black)
        threading.Timer(0.3, loop.interrupt).start()
        with pytest.raises(StepcellError, match="terminat"):
            loop.step(x=white)
        for _ in range(2):  # with either buffer
            np.testing.assert_array_equal(loop.step(x=black)["y"], black)


def test_the_process_ends_where_the_library_does_not(model: Path, clip: Path, tmp_path: Path) -> None:
    """As with a driver that hangs. What was written is recovered by the next run, as after a kill."""
    script = (
        "from stepcell.runtime.backends.onnxruntime.backend import OrtBackend\n"
        "from stepcell.runtime.streams import watchdog\n"
        "OrtBackend.interrupt = lambda self: None\n"
        "watchdog.GRACE_SECONDS = 0.1\n"
        "from stepcell.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "run", str(model), "-i", str(clip), "-o", str(tmp_path / "out.npy")]
    environment = {STEP_SECONDS.name: "0.5", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 6, done.stderr
    said = " ".join(done.stderr.split())
    assert "error: " in said
    assert "step 4 has not returned for 0.5 seconds" in said
    assert not (tmp_path / "out.npy").exists()
    np.save(clip, np.zeros((2, 4, 4, 3), np.uint8))
    run_streams(model, str(clip), tmp_path / "out.npy")
    assert [len(np.load(path)) for path in tmp_path.glob("out.*.npy")] == [3], "recovered"


class Counted(RunControl):
    """Counts how often the run was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[DeviceError] = []

    def give_up(self, error: DeviceError) -> None:
        self.errors.append(error)


def test_what_is_late_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_SECONDS.name, "0.2")
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    control, asked = Counted(), threading.Event()
    watched = watchdog.Watchdog("m", asked.set, control.give_up)
    watched.start()
    for _ in range(8):  # longer than the limit together, and a first step may take FIRST_STEP_SECONDS
        watched.begin(lambda: "a: frame 1")
        time.sleep(0.05)
        watched.end()
        time.sleep(0.05)
    assert not asked.is_set()
    watched.begin(lambda: "a: frame 2")
    assert asked.wait(10)
    while not control.errors:
        time.sleep(0.01)
    with pytest.raises(DeviceError, match=r"m: step 9 has not returned for 0\.2 seconds \(a: frame 2\)"):
        watched.end()
    watched.close()
    assert len(control.errors) == 1
    monkeypatch.setenv(STEP_SECONDS.name, "never")
    with pytest.raises(UsageError, match=f"{STEP_SECONDS.name}: expected a number above zero"):
        watchdog.Watchdog("m", asked.set, control.give_up)
