"""The model that the Python back end runs, with the back end's module replaced; `make fleet` runs the real one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell import StepLoop
from stepcell.runtime.serving import triton_model
from stepcell.runtime.serving.protocol import CHECK, check_values
from stepcell.runtime.serving.settings import Settings
from stepcell.runtime.serving.triton_model import TritonPythonModel
from tests.fakes import triton_backend
from tests.fakes.triton_backend import InferenceResponse, MetricFamily, Request
from tests.runtime.serving.serving_model import order_model

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 1, 2, 4, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    (tmp_path / "repository" / "1").mkdir(parents=True)
    model = order_model(tmp_path / "order.onnx", write_model)
    shutil.copy(model, tmp_path / "repository" / "1" / "order.onnx")
    return tmp_path


@pytest.fixture
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TritonPythonModel]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_backend)
    monkeypatch.setattr(MetricFamily, "made", {})
    monkeypatch.setattr(triton_model, "_METRIC_SECONDS", 0)

    def start(**settings: Any) -> TritonPythonModel:
        parameters = Settings(model="order.onnx", slots=2, **settings).parameters()
        config = {
            "parameters": {name: {"string_value": value} for name, value in parameters.items()},
            "instance_group": [{"count": 1}],
        }
        model = TritonPythonModel()
        model.initialize({
            "model_config": json.dumps(config),
            "model_repository": str(folder / "repository"),
            "model_version": "1",
            "model_name": "order",
            "model_instance_name": "order_0",
            "model_instance_device_id": "0",
        })  # fmt: skip
        return model

    return start


def request(number: int, stream: int = 1, *, start: bool = False, pixels: Any = PIXELS) -> Request:
    return Request({
        "x": pixels[max(number, 0)],
        "FRAME": np.array([[number]], np.int64),
        "CLIENT": np.array([[7]], np.int64),
        "START": np.array([[start]], np.int32),
        "END": np.array([[0]], np.int32),
        "CORRID": np.array([[stream]], np.uint64),
    })  # fmt: skip


def outputs(response: InferenceResponse) -> dict[str, Any]:
    assert response.error is None, response.error.message
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}


def test_pixels_are_scaled_stepped_and_scaled_back(opened: Callable[..., TritonPythonModel], folder: Path) -> None:
    model = opened()
    state = np.zeros((1, 2, 4, 3), np.float64)
    for number, frame in enumerate(PIXELS):
        (response,) = model.execute([request(number, start=number == 0)])
        found = outputs(response)
        assert found["STEPPED"].tolist() == [[number]]
        state = state / 2 + frame / 255
        np.testing.assert_allclose(found["y"], state / 2 * 255, atol=0.51)  # the output's range is 0 to 2
        assert found["y"].dtype == np.uint8
    assert MetricFamily.made["stepcell_frames"].value() == 20
    assert MetricFamily.made["stepcell_streams"].value() == 1


def test_metrics_are_no_message_to_the_server_for_each_frame(
    opened: Callable[..., TritonPythonModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_model, "_METRIC_SECONDS", 1000)
    model, frames = opened(), MetricFamily.made["stepcell_frames"]
    for number in range(3):
        model.execute([request(number, start=number == 0)])
    assert frames.value() == 1
    monkeypatch.setattr(model._metrics, "_next", 0)
    model.execute([request(3)])
    assert frames.value() == 4


def test_tensors_are_those_of_the_model(opened: Callable[..., TritonPythonModel], folder: Path) -> None:
    model, frames = opened(pixels=False), np.random.default_rng(0).random((5, 1, 3, 2, 4), np.float32)
    with StepLoop.open(folder / "order.onnx", threads=1) as alone:
        for number, frame in enumerate(frames):
            (response,) = model.execute([request(number, start=number == 0, pixels=frames)])
            np.testing.assert_array_equal(outputs(response)["y"], alone.step(x=frame)["y"])


def test_refusals_are_errors_of_the_server(opened: Callable[..., TritonPythonModel]) -> None:
    model = opened()
    first, second, third = model.execute([request(0, 1, start=True), request(3, 1), request(3, 2)])
    outputs(first)
    assert second.error.message == "OUT_OF_STEP 1: got frame 3, the state is that before frame 1"
    assert third.error.message.startswith("STATE_LOST: ")
    assert MetricFamily.made["stepcell_refused"].value() == 2


def test_a_check_is_answered_without_a_stream(opened: Callable[..., TritonPythonModel]) -> None:
    check = request(CHECK)
    check.tensors["x"] = check_values((1, 1, 1, 3), np.uint8)
    (response,) = opened().execute([check])
    assert list(outputs(response)) == ["STEPPED"]


def test_the_end_of_the_server_writes_all_states(opened: Callable[..., TritonPythonModel], tmp_path: Path) -> None:
    where = {"snapshots": str(tmp_path / "snapshots"), "snapshot_every": 100}
    first = opened(**where)
    for number in range(3):
        last = first.execute([request(number, start=number == 0)])
    first.finalize()
    second = opened(**where)
    np.testing.assert_array_equal(outputs(second.execute([request(3)])[0])["y"].shape, outputs(last[0])["y"].shape)
    assert MetricFamily.made["stepcell_resumed"].value() == 1


def test_a_back_end_that_damages_arrays_fails_its_checks(opened: Callable[..., TritonPythonModel]) -> None:
    """As one built for numpy 1 does with numpy 2: the first element, repeated."""
    damaged = request(CHECK)
    damaged.tensors["x"] = np.ones((1, 1, 1, 3), np.uint8)
    (response,) = opened().execute([damaged])
    assert "the server damages arrays" in response.error.message
