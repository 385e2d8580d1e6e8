"""`stepcell fuse` as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from stepcell.cli import main
from stepcell.cli.fuse import _parse_values


class Network(nn.Module):
    """A ConvGRU in its usual spelling, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(3 + 4, 8, 3, padding=1)
        self.candidate = nn.Conv2d(3 + 4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        r, z = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        n = self.candidate(torch.cat([x, r * h], 1)).tanh()
        h = (1 - z) * h + z * n
        return self.head(h), h


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def exported_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("foreign") / "model.onnx"
    torch.onnx.export(
        Network().eval(),
        (torch.zeros(1, 3, 16, 24), torch.zeros(1, 4, 16, 24)),
        str(path),
        input_names=["x", "feat"],
        output_names=["y", "feat_out"],
        external_data=False,
        verbose=False,
    )
    return path.read_bytes()


@pytest.fixture
def model(tmp_path: Path, exported_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(exported_bytes)
    return Path("model.onnx")


def test_fuse_inspect_run(model: Path) -> None:
    result = call("fuse", model, "-o", "fused.onnx", "--state", "feat=feat_out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["contract"]["states"][0]["original_output"] == "feat_out"
    assert report["contract"]["parity"]["steps"] == 100
    (cell,) = report["contract"]["cells"]
    assert (cell["op"], cell["hidden"], cell["kernel"]) == ("stepcell::ConvGRU", 4, [3, 3])
    for word in ("input was", "feat_out", "1 x 4 x 16 x 24", "stepcell::ConvGRU", "nodes", "max error over 100 steps"):
        assert word in result.stderr, word
    shown = call("inspect", "fused.onnx")
    assert shown.exit_code == 0, shown.output
    assert "state_in.feat -> state_out.feat" in shown.output
    assert "100 steps against the original file in ONNX Runtime" in shown.output
    np.save("clip.npy", np.random.default_rng(0).random((5, 3, 16, 24), np.float32))
    run = call("run", "fused.onnx", "--input", "clip.npy", "--output", "out.npy")
    assert run.exit_code == 0, run.output
    assert np.load("out.npy").shape[0] == 5


def _spoil(edit: str) -> None:
    model = onnx.load("model.onnx")
    if edit == "nan":
        weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
        array = onnx.numpy_helper.to_array(weight).copy()
        array[0] = np.nan
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    if edit.startswith("weights in "):
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        Path("short.bin").write_bytes(tensor.raw_data[:-1])
        Path("link.bin").symlink_to("/etc/passwd")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=edit.removeprefix("weights in "))
        tensor.external_data.add(key="length", value=str(8 * 7 * 9 * 4))
    if edit == "unknown op":
        model.graph.node[0].domain = "nobody"
        model.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    if edit == "string":
        model.graph.input.append(onnx.helper.make_tensor_value_info("name", onnx.TensorProto.STRING, [1]))
    if edit == "no rank":
        model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, "model.onnx")


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        ("nan", 1, "returns NaN at step 0"),
        ("weights in /etc/passwd", 1, "only a plain file in the same folder is opened"),
        ("weights in ../weights.bin", 1, "only a plain file in the same folder is opened"),
        ("weights in link.bin", 1, "only a plain file in the same folder is opened"),
        ("weights in nothing.bin", 1, "in 'nothing.bin' beside it, which cannot be read"),
        ("weights in short.bin", 1, "of 'short.bin', which has"),
        ("unknown op", 1, "ONNX Runtime does not load it"),
        ("string", 1, "name: expected one of float16"),
        ("no rank", 1, "x: the file does not give its rank"),
    ],
)
def test_files_that_are_refused(model: Path, edit: str, code: int, message: str) -> None:
    Path("fused.onnx").write_text("what was there")
    _spoil(edit)
    result = call("fuse", model, "-o", "fused.onnx", "--state", "feat=feat_out", "--overwrite")
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert Path("fused.onnx").read_text() == "what was there"
    assert not list(Path().glob(".fused*"))


def test_weights_beside_the_file(model: Path) -> None:
    foreign = onnx.load("model.onnx")
    onnx.save(foreign, "model.onnx", save_as_external_data=True, size_threshold=0, location="model.onnx.data")
    assert Path("model.onnx.data").stat().st_size > 3000
    result = call("fuse", model, "-o", "fused.onnx", "--state", "feat=feat_out")
    assert result.exit_code == 0, result.output
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in onnx.load("fused.onnx").graph.initializer)


def test_damaged_files(model: Path, exported_bytes: bytes) -> None:
    for data in (b"", b"hello", exported_bytes[: len(exported_bytes) // 2], exported_bytes[100:], bytes(1000)):
        model.write_bytes(data)
        result = call("fuse", model, "-o", "fused.onnx")
        assert result.exit_code == 1, result.output
        assert "model.onnx: " in result.output
        assert isinstance(result.exception, SystemExit)
        assert not Path("fused.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.onnx", "-o", "b.onnx"], 1, "missing.onnx: cannot be read"),
        (["model.onnx"], 2, "Missing option '-o'"),
        (["model.onnx", "-o", "model.onnx"], 2, "also used as the model"),
        (["model.onnx", "-o", "nowhere/b.onnx"], 1, "nowhere/b.onnx: cannot be written"),
        (["model.onnx", "-o", "."], 1, "is a folder"),
        (["model.onnx", "-o", "b.onnx", "--state", "feat"], 2, "--state: expected IN=OUT"),
        (["model.onnx", "-o", "b.onnx", "--state", "h=feat_out"], 2, "inputs: feat, x"),
        (["model.onnx", "-o", "b.onnx", "--state", "feat=h"], 2, "outputs: feat_out, y"),
        (
            ["model.onnx", "-o", "b.onnx", "--state", "x=feat_out"],
            2,
            "input and output of a state have one dtype and shape",
        ),
        (["model.onnx", "-o", "b.onnx", "--state", "feat=", "--state", "feat=y"], 2, "--state feat: given twice"),
        (["model.onnx", "-o", "b.onnx", "--shape", "x:1x3x8x8"], 2, "--shape x: expected (1, 3, 16, 24)"),
        (["model.onnx", "-o", "b.onnx", "--shape", "16x24"], 2, "--shape: expected NAME:AxBxC"),
    ],
)
def test_bad_calls(model: Path, arguments: list[str], code: int, message: str) -> None:
    result = call("fuse", *arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not Path("b.onnx").exists()


def test_a_file_with_a_contract_is_refused(model: Path) -> None:
    assert call("fuse", model, "-o", "fused.onnx", "--state", "feat=feat_out").exit_code == 0
    result = call("fuse", "fused.onnx", "-o", "again.onnx")
    assert result.exit_code == 2
    assert "has a state contract already" in result.output


def test_what_is_not_clear_is_asked_with_the_arguments_to_type(model: Path) -> None:
    foreign = onnx.load("model.onnx")
    for node in foreign.graph.node:  # an output that could be the next state as well
        node.output[:] = ["feat_new" if name == "feat_out" else name for name in node.output]
        node.input[:] = ["feat_new" if name == "feat_out" else name for name in node.input]
    foreign.graph.output[1].name = "feat_new"
    foreign.graph.node.add(op_type="Neg", input=["feat_new"], output=["feat_next"])
    foreign.graph.output.append(onnx.helper.make_tensor_value_info("feat_next", 1, [1, 4, 16, 24]))
    onnx.save(foreign, "model.onnx")
    # "feat" says data, so that only the cell speaks for a state, and for one output.
    result = call("fuse", model, "-o", "fused.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["contract"]["states"][0]["original_output"] == "feat_new"
    renamed = onnx.load("model.onnx")
    for node in renamed.graph.node:
        node.input[:] = ["h" if name == "feat" else name for name in node.input]
    renamed.graph.input[1].name = "h"
    for node in renamed.graph.node:
        node.output[:] = [name.replace("feat_", "h_") for name in node.output]
        node.input[:] = [name.replace("feat_", "h_") for name in node.input]
    for output in renamed.graph.output:
        output.name = output.name.replace("feat_", "h_")
    onnx.save(renamed, "model.onnx")
    result = call("fuse", model, "-o", "asked.onnx")
    assert result.exit_code == 2, result.output
    assert "--state h=h_new or --state h=h_next" in result.output
    assert not Path("asked.onnx").exists()


def test_killed_half_way_leaves_what_was_there(model: Path) -> None:
    Path("fused.onnx").write_text("what was there")
    command = [
        sys.executable,
        "-m",
        "stepcell",
        "fuse",
        "model.onnx",
        "-o",
        "fused.onnx",
        "--state",
        "feat=feat_out",
        "--overwrite",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(Path().glob(".fused*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert Path("fused.onnx").read_text() == "what was there"


def test_help_has_an_example() -> None:
    result = call("fuse", "--help")
    assert result.exit_code == 0
    assert "stepcell fuse model.onnx -o fused.onnx" in result.output.partition("Examples:")[2]


def test_weights_beside_the_model_are_not_replaced(model: Path) -> None:
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    before = Path("model.onnx.data").read_bytes()
    for name in ("model.onnx.data", "./model.onnx.data", "model.onnx"):
        result = call("fuse", model, "-o", name, "--overwrite", "--state", "feat=feat_out")
        assert result.exit_code == 2, result.output
    assert Path("model.onnx.data").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("k=0.5", [0.5]),
        ("k=[0.5]", [0.5]),
        ("k=(1, 0.5,)", [1, 0.5]),
        ("k=[true,false]", [True, False]),
        ("k=[[1]]", None),
        ("k=[]", None),
        ("k", None),
        ("k=half", None),
    ],
)
def test_numbers_of_an_input(text: str, numbers: list[float] | None, model: Path) -> None:
    if numbers is not None:
        assert _parse_values([text], "--value") == {"k": numbers}
        return
    result = call("fuse", model, "-o", "f.onnx", "--constant", text)
    assert result.exit_code == 2
    assert "such as --constant k=0.25; several in C order: 0.5,0.25" in " ".join(result.stderr.split())
