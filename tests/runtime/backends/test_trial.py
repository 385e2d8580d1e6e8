"""ONNX Runtime that ends its process while it makes a session: the stand-in is a package of that name in the child."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from stepcell.errors import StepcellError
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.runtime.backends.onnxruntime import trial

_STAND_IN = """
import enum, os, signal
class GraphOptimizationLevel(enum.IntEnum):
    NONE = 0
    BASIC = 1
    EXTENDED = 2
    LAYOUT = 3
    ALL = 99
class SessionOptions:
    graph_optimization_level = GraphOptimizationLevel.ALL
    log_severity_level = 0
    def add_free_dimension_override_by_name(self, name, size): pass
class InferenceSession:
    def __init__(self, model, options, providers):
        assert isinstance(model, (bytes, str)) and model
        if int(options.graph_optimization_level) > {limit}:
            os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Children take the stand-in from `tmp_path`, and are started anew before and after a test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    trial._end()
    yield monkeypatch
    trial._end()


def crash_above(folder: Path, limit: int) -> None:
    (folder / "onnxruntime.py").write_text(_STAND_IN.replace("{limit}", str(limit)))


def relu() -> bytes:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, [2])], [value("y", 1, [2])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.usefixtures("crashing")
@pytest.mark.parametrize(("limit", "level", "says"), [(2, 2, "fewer"), (1, 1, "fewer"), (0, 0, "no")])
def test_the_highest_level_that_does_not_crash_is_used(
    limit: int, level: int, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crash_above(tmp_path, limit)
    options = onnxruntime.SessionOptions()
    with caplog.at_level(logging.WARNING):
        trial.choose_level(relu(), options, "net.onnx")
    assert int(options.graph_optimization_level) == level
    (record,) = caplog.records
    assert record.getMessage() == (
        f"net.onnx: ONNX Runtime {onnxruntime.__version__} ends its process with SIGSEGV while it optimises this "
        f"model; it is used with {says} optimisations, which is slower"
    )


@pytest.mark.usefixtures("crashing")
def test_a_crash_at_every_level_is_an_error(tmp_path: Path) -> None:
    crash_above(tmp_path, -1)
    with pytest.raises(StepcellError, match=r"the exported file: .* with SIGSEGV while it loads this model") as caught:
        OnnxSession(relu(), "the exported file")
    assert caught.value.hint is not None
    assert "another version" in caught.value.hint


@pytest.mark.usefixtures("crashing")
def test_a_session_after_a_crash_computes(tmp_path: Path) -> None:
    crash_above(tmp_path, 1)
    session = OnnxSession(relu(), "the exported file")
    np.testing.assert_array_equal(session({"x": np.array([-1, 2], np.float32)})["y"], [0, 2])


@pytest.mark.usefixtures("crashing")
def test_one_child_takes_many_models(tmp_path: Path) -> None:
    crash_above(tmp_path, 99)
    trial.choose_level(relu(), onnxruntime.SessionOptions(), "a")
    first = trial._child
    trial.choose_level(relu(), onnxruntime.SessionOptions(), "b")
    assert first is not None
    assert trial._child is first
    os.kill(first.pid, signal.SIGTERM)  # as if it had been killed for memory: said, and a new one is started
    first.wait()
    trial.choose_level(relu(), onnxruntime.SessionOptions(), "c")
    assert trial._child is not first


def test_an_invalid_model_is_left_to_the_caller() -> None:
    options = onnxruntime.SessionOptions()
    trial.choose_level(b"no model", options, "net.onnx")
    trial.choose_level("missing.onnx", options, "net.onnx")
    assert options.graph_optimization_level == onnxruntime.SessionOptions().graph_optimization_level
