"""`stepcell export` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.cli.common import parse_settings
from stepcell.models import save_checkpoint
from stepcell.models.zoo.denoiser import Denoiser

MODULE = """
import torch
from torch import nn
from stepcell.contract import StateSpec, TensorSpec

class Smoother(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inputs = [TensorSpec(name="frame", shape=("batch", channels, "height", "width"), layout="NCHW")]
        self.outputs = [TensorSpec(name="smooth", shape=("batch", channels, "height", "width"), layout="NCHW")]
        self.states = [StateSpec(name="mean", shape=("batch", channels, "height", "width"))]
        self.rate = nn.Parameter(torch.tensor(0.1))

    def forward(self, frame, mean):
        mean = mean + self.rate.to(mean.dtype) * (frame.to(mean.dtype) - mean)
        return mean.to(frame.dtype), mean

def make(channels=3):
    return Smoother(channels)

def broken():
    raise RuntimeError("no data set here")
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(denoiser, tmp_path / "d.safetensors", family="denoiser", arguments={"hidden": 8})
    return tmp_path / "d.safetensors"


def test_defaults_work_and_json_is_the_contract(checkpoint: Path) -> None:
    result = call("export", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    assert Path("d.onnx").is_file()
    contract = json.loads(result.stdout)
    assert contract["precision"] == "float16"
    assert len(contract["source"]["checkpoint_sha256"]) == 64
    assert "max error over 32 steps: y " in result.stderr


def test_own_module_with_settings(checkpoint: Path) -> None:
    Path("own.py").write_text(MODULE)
    result = call("export", "--module", "own:make", "--set", "channels=1", "-o", "own.onnx", "--json")
    assert result.exit_code == 0, result.output
    contract = json.loads(result.stdout)
    assert contract["inputs"][0]["shape"] == ["batch", 1, "height", "width"]
    assert contract["states"][0]["input"] == "state_in.mean"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'CHECKPOINT'"),
        (["nothing.pth"], 1, "nothing.pth: cannot be read"),
        (["d.safetensors", "--family", "rvm"], 2, "--family rvm: unknown"),
        (["d.safetensors", "--set", "hidden"], 2, "--set: expected KEY=VALUE"),
        (["d.safetensors", "--set", "hidden=8", "--set", "hidden=9"], 2, "given twice"),
        (["d.safetensors", "--shape", "1x3x64x64"], 2, "--shape: expected NAME:AxBxC"),
        (["d.safetensors", "--dynamic", "time"], 2, "no such symbol"),
        (["d.safetensors", "--opset", "9"], 2, "expected 18 to 23, got 9"),
        (["d.safetensors", "--precision", "int8"], 2, "'int8' is not one of"),
        (["d.safetensors", "-o", "missing/d.onnx"], 1, "missing/d.onnx: cannot be written"),
        (["d.safetensors", "--family", "denoiser", "--module", "a:b"], 2, "give one of them"),
        (["--module", "own"], 2, "expected package.module:factory"),
        (["--module", "no_such_module:make"], 2, "cannot import no_such_module"),
        (["--module", "json:nothing"], 2, "json has no callable 'nothing'"),
        (["--module", "collections:OrderedDict"], 1, "expected a torch module"),
    ],
)
def test_bad_calls(checkpoint: Path, arguments: list[str], code: int, message: str) -> None:
    result = call("export", *arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not list(Path().glob("*.onnx"))


def test_an_onnx_file_is_no_checkpoint(checkpoint: Path) -> None:
    Path("m.onnx").write_bytes(b"not looked at")
    result = call("export", "m.onnx")
    assert result.exit_code == 1
    assert "m.onnx: an ONNX file, not a checkpoint" in result.output
    assert "stepcell fuse m.onnx" in result.output
    assert Path("m.onnx").read_bytes() == b"not looked at"


def test_factory_that_fails(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own2.py").write_text(MODULE)
    result = call("export", "--module", "own2:broken")
    assert result.exit_code == 1
    assert "the factory failed: RuntimeError: no data set here" in result.output


def test_wrong_weights_for_a_module_are_listed(checkpoint: Path) -> None:
    Path("own3.py").write_text(MODULE)
    torch.save({"rate": torch.zeros(2), "other": torch.zeros(1)}, "w.pth")
    result = call("export", "w.pth", "--module", "own3:make")
    assert result.exit_code == 1
    assert "unexpected other (1,); rate: expected (), got (2,)" in result.output


def test_list_families() -> None:
    result = call("export", "--list-families")
    assert result.exit_code == 0
    assert "denoiser" in result.stdout
    assert "pooled_gru_heads (alias seed000_gru_heads)" in " ".join(result.stdout.split())


def test_every_command_has_help_with_examples() -> None:
    for name in ("export", "build", "run", "inspect", "doctor"):
        result = call(name, "--help")
        assert result.exit_code == 0
        assert f"stepcell {name}" in result.output.partition("Examples:")[2], name


NOTEBOOK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv_rz, self.conv_n = (nn.Conv2d(3 + channels, n * channels, 3, padding=1) for n in (2, 1))
        self.channels, self.h = channels, None

    def forward(self, x):
        h = torch.zeros(len(x), self.channels, *x.shape[2:]) if self.h is None else self.h
        r, z = torch.sigmoid(self.conv_rz(torch.cat([h, x], 1))).chunk(2, 1)
        self.h = z * h + (1 - z) * torch.tanh(self.conv_n(torch.cat([r * h, x], 1)))
        return self.h

class Counts(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + (self.calls > 9)
"""


def test_the_states_of_any_module_are_lifted_and_its_checkpoint_loaded(checkpoint: Path) -> None:
    Path("notebook.py").write_text(NOTEBOOK)
    weights = {"conv_rz.weight": (8, 7, 3, 3), "conv_rz.bias": (8,), "conv_n.weight": (4, 7, 3, 3), "conv_n.bias": (4,)}
    torch.save({name: torch.randn(shape) for name, shape in weights.items()}, "n.pth")
    arguments = ["n.pth", "--module", "notebook:Net", "--shape", "x:1x3x16x24", "--dynamic", "batch", "-o", "n.onnx"]
    result = call("export", *arguments, "--json")
    assert result.exit_code == 0, result.output
    contract = json.loads(result.stdout)
    assert contract["inputs"][0]["shape"] == ["batch", 3, 16, 24]
    assert [(cell["op"], cell["reset"]) for cell in contract["cells"]] == [("stepcell::ConvGRU", "before")]
    assert contract["states"][0]["input"] == "state_in.h"
    assert len(contract["source"]["checkpoint_sha256"]) == 64
    assert "is stepcell::ConvGRU, 4 channels, kernel 3x3, reset before" in result.stderr
    assert "state:   h (batch, 4, 16, 24), attribute h" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--module", "notebook2:Net"], 2, "needs --shape with the shape of each data input"),
        (["--module", "notebook2:Net", "--shape", "frame:1x3x8x8"], 2, "frame: forward has no such argument"),
        (["--module", "notebook2:Net", "--shape", "x:1x2x8x8"], 1, "Net: forward failed"),
        (["--module", "notebook2:Net", "--shape", "x:1x3x8x8", "--state", "h"], 2, "--state: expected NAME=POSITION"),
        (["--module", "notebook2:Net", "--shape", "x:1x3x8x8", "--state", "h=1", "--state", "h=0"], 2, "given twice"),
        (["--module", "notebook2:Net", "--shape", "x:1x3x8x8", "--dynamic", "time"], 2, "no such symbol"),
        (["--module", "notebook2:Counts", "--shape", "x:1x3x8x8"], 3, "differs from the original"),
        (["d.safetensors", "--state", "h=1"], 2, "--state: is for --module"),
    ],
)
def test_bad_calls_with_a_module_of_ones_own(checkpoint: Path, arguments: list[str], code: int, message: str) -> None:
    Path("notebook2.py").write_text(NOTEBOOK)
    result = call("export", *arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[32, 64]", [32, 64]),
        ("false", False),
        ("False", False),
        ("None", None),
        ("(3, 5)", (3, 5)),
        ("{'a': [1]}", {"a": [1]}),
        ("sum", "sum"),
        ("1.2.3", "1.2.3"),
        ("__import__('os').getpid()", "__import__('os').getpid()"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_settings_are_json_or_literals_of_python(text: str, expected: object) -> None:
    (found,) = parse_settings([f"key={text}"]).values()
    assert found == expected
    assert type(found) is type(expected)


def test_a_checkpoint_is_never_the_output(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    Path("hard.safetensors").hardlink_to(checkpoint)
    for name in ("d.safetensors", "./d.safetensors", "hard.safetensors"):
        for extra in ([], ["--overwrite"]):
            result = call("export", checkpoint, "-o", name, *extra)
            assert result.exit_code == 2, result.output
            assert "also used as the checkpoint" in " ".join(result.stderr.split())
    assert checkpoint.read_bytes() == before


def test_foreign_files_are_replaced_with_overwrite_only(checkpoint: Path) -> None:
    Path("other.pth").write_bytes(b"another network")
    result = call("export", checkpoint, "-o", "other.pth", "--precision", "float32")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert Path("other.pth").read_bytes() == b"another network"
    assert call("export", checkpoint, "-o", "other.pth", "--precision", "float32", "--overwrite").exit_code == 0
    assert call("export", checkpoint, "-o", "other.pth", "--precision", "float32").exit_code == 0  # its own file
