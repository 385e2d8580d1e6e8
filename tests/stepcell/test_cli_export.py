"""`stepcell export` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from stepcell.cli import main
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


def test_every_command_has_help_with_examples() -> None:
    for name in ("export", "build", "run", "inspect", "doctor"):
        result = call(name, "--help")
        assert result.exit_code == 0
        assert f"stepcell {name}" in result.output.partition("Examples:")[2], name
