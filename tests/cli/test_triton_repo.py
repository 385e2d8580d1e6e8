"""`stepcell triton-repo`: what is written, and what is refused."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from onnx import helper

from stepcell.contract import StateSpec, StepContract, TensorSpec
from stepcell.overwrite import is_marked
from tests.cli.command import call
from tests.fakes.fake_engine import Machine


def repo(model: Path, folder: Path, *arguments: object) -> Result:
    return call("triton-repo", model, "-o", folder, *arguments)


def config(folder: Path) -> str:
    (path,) = folder.glob("models/*/config.pbtxt")
    return re.sub(r"\s+", " ", path.read_text())


def parameters(folder: Path) -> dict[str, str]:
    return dict(re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}', config(folder)))


def test_the_repository_of_a_model_of_pictures(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    folder, snapshots = tmp_path / "repo", tmp_path / "snapshots"
    options = ("--slots", 8, "--instances", 2, "--idle", "5min", "--snapshots", snapshots, "--snapshot-every", 10)
    result = repo(denoiser_onnx_float32, folder, "--name", "denoiser", *options, "--json")
    assert result.exit_code == 0, result.stderr
    version = folder / "models" / "denoiser" / "1"
    assert (version / denoiser_onnx_float32.name).read_bytes() == denoiser_onnx_float32.read_bytes()
    imports = ast.parse((version / "model.py").read_text()).body[1]
    assert ast.unparse(imports) == "from stepcell.runtime.serving.triton_model import TritonPythonModel"
    text = config(folder)
    for line in (
        'name: "denoiser" backend: "python" max_batch_size: 8',
        '{ name: "x" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }',
        '{ name: "FRAME" data_type: TYPE_INT64 dims: [ 1 ] }',
        '{ name: "y" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }',
        '{ name: "STEPPED" data_type: TYPE_INT64 dims: [ 1 ] }',
        "instance_group [ { count: 2 kind: KIND_CPU } ]",
        "max_sequence_idle_microseconds: 300000000",
        "preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 20000",
        '{ name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }',
    ):
        assert line in text, text
    assert all(text.count(one) == text.count(other) for one, other in ("[]", "{}"))
    assert parameters(folder) == {
        "model": denoiser_onnx_float32.name, "slots": "8", "device": "cpu", "pixels": "True", "idle": "300.0",
        "snapshots": str(snapshots), "snapshot_every": "10", "keep": "86400.0",
    }  # fmt: skip
    held = re.findall(
        r'key: "contract" value \{ string_value: ("(?:[^"\\]|\\.)*") \}', (version.parent / "config.pbtxt").read_text()
    )
    (frame,) = StepContract.from_json(ast.literal_eval(held[0])).inputs
    assert (frame.shape, frame.dtype, frame.layout) == (("streams", "height", "width", 3), "uint8", "NHWC")
    report = json.loads(result.stdout)
    assert (report["name"], report["frames"], len(report["files"])) == ("denoiser", "pixels", 5)


def test_the_check_of_the_load_balancer_is_a_request_of_the_model(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    servers = ("--server", "10.0.0.5", "--server", "10.0.0.6:9000:9001")
    assert repo(denoiser_onnx_float32, tmp_path, "--name", "d", *servers).exit_code == 0
    text = (tmp_path / "haproxy.cfg").read_text()
    assert text.count("balance hdr(x-stream)\n    hash-type consistent\n") == 2
    assert "server s1 10.0.0.6:9000\n" in text
    assert "server s0 10.0.0.5:8001 proto h2 port 8000 check-proto h1\n" in text
    assert text.count("uri /v2/models/d/infer") == 2
    body = json.loads(re.findall(r"body '(.*)'", text)[0])
    assert body["parameters"] == {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
    assert body["inputs"] == [
        {"name": "x", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]},
        {"name": "FRAME", "shape": [1, 1], "datatype": "INT64", "data": [-1]},
        {"name": "CLIENT", "shape": [1, 1], "datatype": "INT64", "data": [0]},
    ]
    assert max(map(len, text.splitlines())) < 2048  # HAProxy's longest line


def test_the_start_script_is_a_program(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    assert repo(denoiser_onnx_float32, folder).exit_code == 0
    subprocess.run(["sh", "-n", folder / "serve.sh"], check=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor each in "$@"; do echo "$each"; done\n')
    python.chmod(0o755)
    done = subprocess.run(
        [folder / "serve.sh", "--http", "9000"], env={**os.environ, "PYTHON": str(python)}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    name = denoiser_onnx_float32.stem
    expected = ["-m", "stepcell.runtime.serving.serve", f"{folder}/models", "--model", name, "--http", "9000"]
    assert done.stdout.split("\n")[:-1] == expected


def test_tensors_by_request_and_where_a_model_takes_no_picture(
    denoiser_onnx_float32: Path, stack_onnx: Path, tmp_path: Path
) -> None:
    assert repo(denoiser_onnx_float32, tmp_path / "a", "--frames", "tensors").exit_code == 0
    assert '{ name: "x" data_type: TYPE_FP32 dims: [ -1, -1, -1 ] }' in config(tmp_path / "a")
    result = repo(stack_onnx, tmp_path / "b")  # the range of its input is undefined
    assert result.exit_code == 0, result.stderr
    assert parameters(tmp_path / "b")["pixels"] == "False"
    assert "frames:    tensors" in result.stderr
    refused = repo(stack_onnx, tmp_path / "c", "--frames", "pixels")
    assert refused.exit_code == 2
    assert "is undefined" in refused.stderr
    assert not (tmp_path / "c").exists()


def test_an_engine_comes_with_its_sidecar(denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Machine(denoiser_onnx, tmp_path, monkeypatch).path
    folder = tmp_path / "repo"
    result = repo(engine, folder, "--name", "m", "--device", "cuda:1")
    assert result.exit_code == 0, result.stderr
    names = {path.name for path in (folder / "models" / "m" / "1").iterdir()}
    assert names == {"model.py", engine.name, f"{engine.name}.json"}
    assert "kind: KIND_GPU gpus: [ 1 ]" in config(folder)
    assert repo(engine, folder, "--name", "m").exit_code == 0  # again


def test_files_of_others_are_kept(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    assert repo(denoiser_onnx_float32, folder, "--name", "m").exit_code == 0
    assert repo(denoiser_onnx_float32, folder, "--name", "m", "--slots", 2).exit_code == 0
    assert parameters(folder)["slots"] == "2"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) == 5
    assert sum(map(is_marked, written)) == 4
    for path in written:
        before = path.read_bytes()
        path.write_text("mine")
        result = repo(denoiser_onnx_float32, folder, "--name", "m")
        assert result.exit_code == 2, path
        assert "exists already" in result.stderr
        assert path.read_text() == "mine"
        path.write_bytes(before)
    (folder / "serve.sh").write_text("mine")
    assert repo(denoiser_onnx_float32, folder, "--name", "m", "--overwrite").exit_code == 0
    assert is_marked(folder / "serve.sh")


def test_the_model_in_the_repository_is_no_source(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    assert repo(denoiser_onnx_float32, tmp_path, "--name", "m").exit_code == 0
    inside = tmp_path / "models" / "m" / "1" / denoiser_onnx_float32.name
    result = repo(inside, tmp_path, "--name", "m")
    assert result.exit_code == 2
    assert "also used as the model" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--idle", "30"), "--idle: expected a time"),
        (("--idle", "0s"), "--idle: expected a time"),
        (("--name", "a/b"), "--name: expected letters"),
        (("--server", "host:80"), "--server: expected HOST"),
        (("--server", "host\n:1:2"), "--server: expected HOST"),
        (("--server", "host:1:70000"), "--server: expected HOST"),
        (("--device", "tpu"), "--device: expected"),
        (("--snapshots", "a\nb"), "--snapshots"),
    ],
)
def test_malformed_options(denoiser_onnx_float32: Path, tmp_path: Path, arguments: Any, words: str) -> None:
    result = repo(denoiser_onnx_float32, tmp_path / "repo", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "repo").exists()


def test_models_that_cannot_be_served(denoiser_onnx_fixed: Path, tmp_path: Path, write_model: Any) -> None:
    refused = repo(denoiser_onnx_fixed, tmp_path / "a", "--slots", 4)
    assert refused.exit_code == 2
    assert "--dynamic batch" in refused.stderr
    contract = StepContract(
        inputs=(TensorSpec(name="FRAME", shape=("batch", 2)),),
        outputs=(TensorSpec(name="y", shape=("batch", 2)),),
        states=(StateSpec(name="h", shape=("batch", 2)),),
    )
    nodes = [
        helper.make_node("Add", ["FRAME", "state_in.h"], ["y"]),
        helper.make_node("Identity", ["y"], ["state_out.h"]),
    ]
    model = write_model(tmp_path / "named.onnx", contract, nodes)
    refused = repo(model, tmp_path / "b")
    assert refused.exit_code == 2
    assert "one of the protocol" in refused.stderr
    assert repo(tmp_path / "absent.onnx", tmp_path / "c").exit_code == 1
    (tmp_path / "text.onnx").write_text("no model")
    assert repo(tmp_path / "text.onnx", tmp_path / "c").exit_code == 1
    assert repo(tmp_path / "model.pt", tmp_path / "c").exit_code == 1


def test_a_folder_that_cannot_be_written(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = repo(denoiser_onnx_float32, tmp_path / "file" / "repo")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_the_size_of_a_snapshot_is_that_of_one_stream(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    shutil.copy(denoiser_onnx_float32, tmp_path / "m.onnx")
    result = repo(tmp_path / "m.onnx", tmp_path / "repo", "--json")
    from stepcell.onnx_model import read_onnx

    contract = read_onnx(denoiser_onnx_float32).contract
    (state,) = contract.states
    shape = contract.state_shapes({**contract.example, "batch": 1})[state.name]
    assert json.loads(result.stdout)["state_bytes"] == 4 * int(np.prod(shape))
