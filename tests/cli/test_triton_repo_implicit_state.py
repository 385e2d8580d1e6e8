"""`stepcell triton-repo --implicit-state`: files for Triton's own back ends, and models that these cannot serve."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result
from onnx import helper

from stepcell import StepLoop
from stepcell.contract import InitialValue, StateSpec, StepContract, TensorSpec
from stepcell.runtime.engine.sidecar import PluginUse, Sidecar, read_sidecar, sidecar_path
from tests.cli.command import call
from tests.fakes.fake_engine import Machine

NAMES = ("h2", "h10", "h", "c", "h1", "encoder.2.h")


def repo(model: Path, folder: Path, *arguments: object) -> Result:
    return call("triton-repo", model, "-o", folder, "--implicit-state", "--name", "m", *arguments)


def config(folder: Path) -> str:
    return re.sub(r"\s+", " ", (folder / "models" / "m" / "config.pbtxt").read_text())


def states(folder: Path) -> list[tuple[str, str, str, list[int], str]]:
    """Input, output, type, sizes and initial value of each state, as the file has them."""
    found = re.findall(
        r'input_name: "(\S+)" output_name: "(\S+)" data_type: TYPE_(\w+) dims: \[ ([^\]]*) \] '
        r'initial_state \[ \{ name: "\S+" data_type: TYPE_(\w+) dims: \[ ([^\]]*) \] (\S+: \S+) \} \]',
        config(folder),
    )
    assert all((kind, dims) == (other, again) for _, _, kind, dims, other, again, _ in found)
    return [
        (one, two, kind, [int(dim) for dim in dims.split(", ")], value) for one, two, kind, dims, _, _, value in found
    ]


def several_states(path: Path, write_model: Callable[..., Path], **changes: Any) -> Path:
    """Each state is another multiple of the frames, summed up; y depends on all of them in another way."""
    shape = ("batch", 2, "width")
    contract = StepContract(
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=shape),),
        states=tuple(StateSpec(name=name, shape=shape, **changes) for name in NAMES),
    )
    nodes = [helper.make_node("Constant", [], [f"k{index}"], value_float=index + 2.0) for index in range(len(NAMES))]
    for index, name in enumerate(NAMES):
        nodes += [
            helper.make_node("Mul", ["x", f"k{index}"], [f"p{index}"]),
            helper.make_node("Add", [f"p{index}", f"state_in.{name}"], [f"state_out.{name}"]),
            helper.make_node("Mul", [f"state_out.{name}", f"k{index}"], [f"q{index}"]),
        ]
    nodes += [helper.make_node("Sum", [f"q{index}" for index in range(len(NAMES))], ["y"])]
    return write_model(path, contract, nodes)


def test_the_configuration_of_a_model_of_pictures(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    options = ("--shape", "x:1x3x32x48", "--slots", 8, "--instances", 2, "--idle", "5min", "--json")
    result = repo(denoiser_onnx_float32, tmp_path, *options)
    assert result.exit_code == 0, result.stderr
    copied = tmp_path / "models" / "m" / "1" / denoiser_onnx_float32.name
    assert copied.read_bytes() == denoiser_onnx_float32.read_bytes()
    text = config(tmp_path)
    for line in (
        f'name: "m" backend: "onnxruntime" default_model_filename: "{copied.name}" max_batch_size: 8',
        'input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, 32, 48 ] } ]',
        'output [ { name: "y" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] } ]',  # the file leaves them open
        "instance_group [ { count: 2 kind: KIND_CPU } ]",
        "max_sequence_idle_microseconds: 300000000",
        "oldest { max_candidate_sequences: 8 preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 20000 }",
    ):
        assert line in text, text
    assert states(tmp_path) == [("state_in.h", "state_out.h", "FP32", [8, 16, 24], "zero_data: true")]
    assert "control_input" not in text  # the model has no input for it
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted([copied.name, "config.pbtxt"])
    assert "lost with it or after 300 s without a frame" in result.stderr
    assert len(json.loads(result.stdout)["files"]) == 2


def test_the_file_fits_the_schema_of_the_server(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc", reason="the schema is in tritonclient, which is not installed")
    for folder, options in ((tmp_path / "a", ("--implicit-state", "--shape", "x:1x3x32x48")), (tmp_path / "b", ())):
        result = call("triton-repo", denoiser_onnx_float32, "-o", folder, "--name", "m", *options, "--json")
        assert result.exit_code == 0, result.stderr
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (tmp_path / "a" / "models" / "m" / "config.pbtxt").read_text()
    found = text_format.Parse(text, model_config_pb2.ModelConfig())
    (state,) = found.sequence_batching.state
    assert (state.input_name, state.output_name, list(state.dims)) == ("state_in.h", "state_out.h", [8, 16, 24])
    assert not state.use_same_buffer_for_input_output
    (initial,) = state.initial_state
    assert (initial.zero_data, initial.data_type, list(initial.dims)) == (True, state.data_type, [8, 16, 24])


def test_a_server_that_follows_the_file_steps_as_a_loop_does(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    """Triton's rules, in ONNX Runtime: states in maps sorted by name, the n-th output is the next n-th input."""
    model = several_states(tmp_path / "m.onnx", write_model)
    assert repo(model, tmp_path / "repo", "--shape", "x:1x2x3").exit_code == 0
    written = states(tmp_path / "repo")
    inputs, outputs = (sorted(each[index] for each in written) for index in (0, 1))
    assert len(inputs) == len(NAMES)
    held = {name: np.zeros((1, *dims), np.float32) for name, _, _, dims, _ in written}
    session = onnxruntime.InferenceSession(tmp_path / "repo" / "models" / "m" / "1" / "m.onnx")
    frames = np.random.default_rng(0).random((5, 1, 2, 3), np.float32)
    with StepLoop.open(model, threads=1) as loop:
        for frame in frames:
            y, *after = session.run(["y", *outputs], {"x": frame, **held})
            held = dict(zip(inputs, after, strict=True))
            np.testing.assert_array_equal(y, loop.step(x=frame)["y"])


def test_a_state_that_does_not_begin_with_zeros_is_a_file(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    value = np.arange(2, dtype=np.float32).reshape(2, 1)  # constant along the width
    model = several_states(tmp_path / "m.onnx", write_model, init=InitialValue.of(value))
    result = repo(model, tmp_path / "repo", "--shape", "x:1x2x3")
    assert result.exit_code == 0, result.stderr
    assert [each[4] for each in states(tmp_path / "repo")] == [f'data_file: "state{index}"' for index in range(6)]
    held = np.frombuffer((tmp_path / "repo" / "models" / "m" / "initial_state" / "state3").read_bytes(), "<f4")
    np.testing.assert_array_equal(held.reshape(2, 3), [[0, 0, 0], [1, 1, 1]])
    assert repo(model, tmp_path / "repo", "--shape", "x:1x2x3").exit_code == 0  # again


def test_one_stream_at_a_time_where_the_batch_is_fixed(denoiser_onnx_fixed: Path, tmp_path: Path) -> None:
    refused = repo(denoiser_onnx_fixed, tmp_path)
    assert refused.exit_code == 2
    assert "--slots 1" in refused.stderr
    assert not (tmp_path / "models").exists()
    assert repo(denoiser_onnx_fixed, tmp_path, "--slots", 1).exit_code == 0
    text = config(tmp_path)
    assert "max_batch_size: 0" in text
    assert "oldest { max_candidate_sequences: 1 }" in text
    assert re.search(r'name: "x" data_type: TYPE_FP\d\d dims: \[ 1, 3, \d+, \d+ \]', text)
    assert re.search(r'output_name: "state_out.h" data_type: TYPE_FP32 dims: \[ 1, 8, \d+, \d+ \]', text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "such as --shape x:1x3x"),
        (("--shape", "z:1x3x32x48"), "--shape z: the model has no such input"),
        (("--shape", "x:1x4x32x48"), "expected shape"),
        (("--shape", "x:1x3x32x48", "--frames", "pixels"), "--frames with --implicit-state"),
        (("--shape", "x:1x3x32x48", "--snapshots", "there"), "--snapshots with --implicit-state"),
        (("--shape", "x:1x3x32x48", "--server", "10.0.0.5"), "--server with --implicit-state"),
    ],
)
def test_what_is_missing_or_has_no_meaning(
    denoiser_onnx_float32: Path, tmp_path: Path, arguments: Any, words: str
) -> None:
    result = repo(denoiser_onnx_float32, tmp_path, *arguments)
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "models").exists()


def test_a_value_that_stepcell_gives_is_refused(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    contract = StepContract(
        inputs=(
            TensorSpec(name="x", shape=("batch", 2)),
            TensorSpec(name="k", shape=(1,), value=(2.0,), batch_axis=None),
        ),
        outputs=(TensorSpec(name="y", shape=("batch", 2)),),
        states=(StateSpec(name="h", shape=("batch", 2)),),
    )
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["p"]),
        helper.make_node("Add", ["p", "state_in.h"], ["y"]),
        helper.make_node("Identity", ["y"], ["state_out.h"]),
    ]
    result = repo(write_model(tmp_path / "m.onnx", contract, nodes), tmp_path / "repo")
    assert result.exit_code == 2
    assert "k: has a value in the contract" in result.stderr


def test_a_graph_whose_states_are_not_those_of_the_contract(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    model = several_states(tmp_path / "m.onnx", write_model)
    changed = onnx.load(model)
    (output,) = (value for value in changed.graph.output if value.name == "state_out.c")
    output.type.tensor_type.shape.dim[2].dim_param = "other"
    onnx.save(changed, model)
    result = repo(model, tmp_path / "repo", "--shape", "x:1x2x3")
    assert result.exit_code == 1
    assert "state_in.c and state_out.c differ in type or shape" in result.stderr
    assert not (tmp_path / "repo").exists()


def test_engines_that_need_stepcell_or_another_tensorrt(
    denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Machine(denoiser_onnx, tmp_path, monkeypatch).path
    sidecar = read_sidecar(engine)
    result = repo(engine, tmp_path / "repo")
    assert result.exit_code == 2
    assert "was built by TensorRT-RTX" in result.stderr
    other = msgspec.structs.replace(sidecar.fingerprint, flavor="tensorrt", tensorrt="11.4.0.7")
    for plugin, words in (
        (PluginUse(used=True, reason=""), "needs stepcell's plugin"),
        (None, "is outside of what it was built for"),
    ):
        changed = msgspec.structs.replace(sidecar, fingerprint=other, plugin=plugin, fp16_mirrors=())
        sidecar_path(engine).write_text(changed.to_json())
        result = repo(engine, tmp_path / "repo", "--slots", 64, *_frame(sidecar))
        assert result.exit_code == 2
        assert words in result.stderr
    rows = sidecar.profiles["x"].max[0]
    result = repo(engine, tmp_path / "repo", "--slots", rows, *_frame(sidecar))
    assert result.exit_code == 0, result.stderr
    text = config(tmp_path / "repo")
    assert "# The server needs TensorRT 11.4.0.7. Not run by stepcell:" in text
    assert 'platform: "tensorrt_plan"' in text
    assert "not run by stepcell" in result.stderr
    assert f'default_model_filename: "{engine.name}"' in text
    assert "kind: KIND_GPU" in text
    assert repo(engine, tmp_path / "again", "--device", "cpu").exit_code == 2


def _frame(sidecar: Sidecar) -> tuple[str, str]:
    return "--shape", f"x:{'x'.join(map(str, sidecar.profiles['x'].opt))}"


def test_the_other_form_of_a_repository_is_not_written_over(denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    assert call("triton-repo", denoiser_onnx_float32, "-o", tmp_path, "--name", "m").exit_code == 0
    result = repo(denoiser_onnx_float32, tmp_path, "--shape", "x:1x3x32x48")
    assert result.exit_code == 2
    assert "choose another folder" in result.stderr
    refused = call("triton-repo", denoiser_onnx_float32, "-o", tmp_path, "--name", "m", "--shape", "x:1x3x32x48")
    assert refused.exit_code == 2
    assert "is for --implicit-state" in refused.stderr
