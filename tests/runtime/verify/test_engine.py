"""An engine is verified on a fake GPU, its sidecar keeps the result, and `run` asks for it; its layers are audited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.runtime import cuda
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.layers import EngineLayer, LayerTensor, layers_of_inspector
from stepcell.runtime.engine.sidecar import read_sidecar, sidecar_path
from stepcell.runtime.verify import place
from stepcell.runtime.verify.audit import audit_layers, precision_verdict
from tests.fakes.fake_engine import Machine

FAST = ("--steps", "16", "--warm-up", "64", "--shape", "x:1x3x16x16")


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def plain(denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(place, "_MODULE_VERSION", tmp_path / "no driver")
    return Machine(denoiser_onnx, tmp_path, monkeypatch)


def test_an_engine_passes_and_its_sidecar_says_where(plain: Machine, denoiser_onnx: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.npy"
    np.save(clip, np.zeros((2, 16, 16, 3), np.uint8))
    refused = call("run", plain.path, "--device", "cuda", "--input", clip, "--require-verified")
    assert refused.exit_code == 3
    assert "was not verified on Fake GPU" in refused.stderr

    page = tmp_path / "page.html"
    result = call("verify", plain.path, "--against", denoiser_onnx, "--report", page, "--json", *FAST)
    assert result.exit_code == 0, result.stderr
    assert "<td>correlation</td><td>float16</td>" in page.read_text()  # the kernels of the engine
    passed = {verdict["name"] for verdict in json.loads(result.stdout)["verdicts"] if verdict["passed"]}
    assert passed >= {"growth", "prediction", "storage", "precision", "liveness", "isolation", "reset", "resume"}
    (line,) = read_sidecar(plain.path).verified
    assert (line.passed, line.device, line.driver, line.steps) == (True, "Fake GPU", "CUDA 13.0", 16)

    assert "passed on Fake GPU, driver CUDA 13.0" in call("inspect", plain.path).stdout
    accepted = call("run", plain.path, "--device", "cuda", "--input", clip, "--require-verified")
    assert accepted.exit_code == 0, accepted.stderr
    assert "verified: passed on Fake GPU" in accepted.stderr


def test_another_driver_is_another_device(plain: Machine, denoiser_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("verify", plain.path, "--against", denoiser_onnx, *FAST).exit_code == 0
    newer = cuda.Discovery((cuda.Gpu(0, "Fake GPU", "8.9", 1 << 30),), "13.1", "")
    monkeypatch.setattr(cuda, "discover", lambda: newer)
    refused = call("run", plain.path, "--device", "cuda", "--input", "clip.mp4", "--require-verified")
    assert refused.exit_code == 3
    assert "driver CUDA 13.1 (verified: Fake GPU, driver CUDA 13.0)" in refused.stderr


def test_an_engine_that_forgets_its_state_fails_and_says_so_everywhere(
    plain: Machine, denoiser_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plain.engine.session.run

    def forgetful(names: Any, feeds: dict[str, Any]) -> Any:
        return run(names, {**feeds, "state_in.h": feeds["state_in.h"] * 0})

    monkeypatch.setattr(plain.engine, "session", type("Session", (), {"run": staticmethod(forgetful)}))
    result = call("verify", plain.path, "--against", denoiser_onnx, *FAST)
    assert result.exit_code == 3
    assert "liveness" in result.stderr.splitlines()[-1]
    assert not read_sidecar(plain.path).verified[0].passed
    refused = call("run", plain.path, "--device", "cuda", "--input", "clip.mp4", "--require-verified")
    assert "was verified on Fake GPU and failed: " in refused.stderr


def test_an_onnx_file_keeps_no_record(denoiser_onnx: Path) -> None:
    assert call("run", denoiser_onnx, "--input", "clip.mp4", "--require-verified").exit_code == 2


@pytest.fixture(scope="module")
def layers(denoiser_onnx_fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, tuple[EngineLayer, ...]]:
    """Contract and layers of an engine that TensorRT-RTX built here, with no GPU."""
    path = tmp_path_factory.mktemp("audit") / "model.engine"
    build_engine(denoiser_onnx_fixed, path)
    sidecar = read_sidecar(path)
    assert msgspec.json.decode(sidecar_path(path).read_bytes())["layers"]
    return sidecar.contract, sidecar.layers


def test_the_layers_of_a_real_engine_are_what_the_contract_says(layers: Any) -> None:
    contract, found = layers
    audit = audit_layers(found, contract)
    assert audit.heavy == {"float16": 6}  # five convolutions of the network, one of them transposed, and the cell's two
    assert audit.states == {"state_in.h": "float32", "state_out.h": "float32"}
    verdict = precision_verdict(found, contract)
    assert verdict.passed, verdict.says
    assert "6 of 6 convolutions" in verdict.says


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("weights", "computes in another dtype than float16"),
        ("sums", "sums in less than float32"),
        ("state", "state_out.h is float16"),
        ("update", "the update of h is computed narrower"),
    ],
)
def test_a_layer_of_another_precision_fails(layers: Any, fault: str, says: str) -> None:
    contract, found = layers

    def changed(layer: EngineLayer) -> EngineLayer:
        replace = msgspec.structs.replace
        wide = tuple(replace(t, dtype="float32") for t in layer.constants if len(t.shape) > 1)
        if fault == "weights" and layer.name.startswith("encoder"):
            return replace(layer, constants=wide)
        if fault == "sums" and layer.kind == "correlation":
            return replace(layer, constants=tuple(replace(t, dtype="float16") for t in layer.constants))
        if any(t.name == "state_out.h" for t in layer.outputs):
            if fault == "state":
                return replace(layer, outputs=tuple(replace(t, dtype="float16") for t in layer.outputs))
            if fault == "update":
                return replace(layer, inputs=(LayerTensor(name="h_half", dtype="float16"),))
        return layer

    verdict = precision_verdict([changed(layer) for layer in found], contract)
    assert verdict.passed is False
    assert says in verdict.says


def test_the_inspector_of_tensorrt_10() -> None:
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "conv",
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP16"}],
                    "Outputs": [{"Name": "y", "Dimensions": [1, 8, 8, 8], "Datatype": "Float", "Format": "linear"}],
                }
            ]
        }
    )
    (layer,) = layers_of_inspector(text)
    assert layer.inputs == (LayerTensor(name="x", dtype="float16", shape=(1, 3, 8, 8)),)
    assert layer.outputs[0].dtype == "float32"
    assert layers_of_inspector(json.dumps({"Layers": ["conv"]})) == ()
