"""`stepcell verify`: the table, the page, the exit code, and a reference recorded for a box without it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.exporter import export_onnx
from stepcell.models.checkpoint_writer import save_checkpoint
from stepcell.models.zoo.denoiser import Denoiser

FAST = ("--steps", "16", "--warm-up", "64", "--shape", "x:1x3x16x16")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint.safetensors and model.onnx, and good.onnx of other weights."""
    folder = tmp_path_factory.mktemp("verify")
    for seed, name in ((0, "model"), (1, "other")):
        torch.manual_seed(seed)
        model = Denoiser(hidden=4).eval()
        save_checkpoint(model, folder / f"{name}.safetensors", family="denoiser", arguments={"hidden": 4})
        export_onnx(model, folder / f"{name}.onnx", family="denoiser", source={"arguments": {"hidden": 4}})
    return folder


def verify(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_model_passes_against_its_checkpoint_and_leaves_a_page(files: Path, tmp_path: Path) -> None:
    page, plot = tmp_path / "page.html", tmp_path / "plot.svg"
    wanted = ("--report", page, "--plot", plot, "--json")
    result = verify(files / "model.onnx", "--against", files / "model.safetensors", *wanted, *FAST)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {v["name"]: v["passed"] for v in report["verdicts"]} == {
        "identity": True,
        "growth": True,
        "prediction": True,
        "storage": True,
        "bound": True,
        "precision": True,
        "liveness": True,
        "pairing": None,  # one state
        "isolation": True,
        "reset": True,
        "resume": True,
    }
    assert [g["name"] for g in report["growth"]] == ["y", "h"]
    assert report["growth"][0]["steps"] == [1, 2, 4, 8, 16]
    assert "all 10 verdicts passed" in result.stderr
    text = page.read_text()
    assert text.count("<svg") == 2
    assert 'name="viewport"' in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded
    assert "<script" not in text
    assert plot.read_text().startswith("<svg")


def test_weights_of_another_checkpoint_fail_with_exit_code_3(files: Path) -> None:
    result = verify(files / "model.onnx", "--against", files / "other.safetensors", *FAST)
    assert result.exit_code == 3
    assert "identity" in result.stderr.splitlines()[-1]


def test_another_onnx_file_and_the_cpu(files: Path) -> None:
    same = verify(files / "model.onnx", "--against", files / "model.onnx", "--device", "cpu", *FAST)
    assert same.exit_code == 0, same.stderr
    assert verify(files / "model.onnx", "--against", files / "other.onnx", *FAST).exit_code == 3


def test_a_reference_recorded_here_is_compared_where_there_is_no_torch(files: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "reference.npz"
    made = verify(files / "model.onnx", "--against", files / "model.safetensors", "--record", recorded, *FAST)
    assert made.exit_code == 0, made.stderr
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from stepcell.cli import main\n"
        f"main(['verify', {str(files / 'model.onnx')!r}, '--device', 'cpu', '--against', {str(recorded)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdicts passed" in done.stderr
    wrong = verify(files / "other.onnx", "--device", "cpu", "--against", recorded)
    assert wrong.exit_code in (1, 3)


def test_a_plot_as_png(files: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    assert verify(files / "model.onnx", "--plot", plot, *FAST).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "a.gif"], "--plot"),
        (["--input", "missing.mp4"], "missing.mp4"),
        (["--shape", "z:1x3x8x8"], "no such input"),
        (["--device", "cuda"], ""),
    ],
)
def test_what_does_not_fit_is_named(files: Path, arguments: list[str], message: str) -> None:
    result = verify(files / "model.onnx", *arguments)
    assert result.exit_code not in (0, 3)
    assert message in result.stderr


TRACKER = """
import torch
from torch import nn

class Tracker(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.channels = channels
        self.cell = nn.Conv2d(3 + channels, channels, 3, padding=1)

    def forward(self, x, h=None):
        if h is None:
            h = x.new_zeros(x.shape[0], self.channels, *x.shape[2:])
        h = torch.tanh(self.cell(torch.cat([x, h], 1)))
        return h.mean(1, keepdim=True), h
"""


def test_a_module_of_ones_own_is_built_again_from_its_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tracker.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    factory = importlib.import_module("own_tracker").Tracker
    weights, model = tmp_path / "weights.pth", tmp_path / "tracker.onnx"
    torch.save(factory(4).state_dict(), weights)
    wanted = ["--module", "own_tracker:Tracker", "--set", "channels=4", "--shape", "x:1x3x8x8", "--dynamic", "batch"]
    made = CliRunner().invoke(main, ["export", str(weights), *wanted, "-o", str(model)])
    assert made.exit_code == 0, made.output
    result = verify(model, "--against", weights, "--steps", "16", "--warm-up", "32", "--json")
    assert result.exit_code == 0, result.stderr
    says = {verdict["name"]: verdict["says"] for verdict in json.loads(result.stdout)["verdicts"]}
    assert "equals its source" in says["identity"]
    # declared float32, computed in float16: stored as narrowly as that
    assert "computed in float16 by the module's own code" in says["precision"]
    assert "lost to rounding in float16" in says["storage"]


LEAKY = """
import torch
from torch import nn

class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.h = nn.Conv2d(3, 4, 3, padding=1), None

    def forward(self, x):
        new = torch.tanh(self.conv(x))
        self.h = 0.1 * new if self.h is None else 0.9 * self.h + new * 0.1
        return self.h / 3.3 + torch.tensor(0.2)
"""


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_numbers_in_the_code_are_rounded_as_the_file_has_them(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaky_average.py").write_text(LEAKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights, model = tmp_path / "weights.pth", tmp_path / "model.onnx"
    torch.save(importlib.import_module("leaky_average").Leaky().state_dict(), weights)
    wanted = ["--module", "leaky_average:Leaky", "--shape", "x:1x3x8x8", "--precision", precision]
    made = CliRunner().invoke(main, ["export", str(weights), *wanted, "-o", str(model)])
    assert made.exit_code == 0, made.output
    result = verify(model, "--against", weights, "--steps", "8", "--warm-up", "16", "--json")
    numbers = {verdict["name"]: verdict["value"] for verdict in json.loads(result.stdout)["verdicts"]}
    assert numbers["identity"] < 1e-12


TWO_BIASES = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.inside, self.cell, self.out = nn.Linear(6, 6), nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x, h=None):
        h = torch.zeros(x.shape[0], 8) if h is None else h
        h = self.cell(self.inside(x), h)
        return self.out(h), h
"""


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_good_file_whose_biases_were_added_passes(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_biases.py").write_text(TWO_BIASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights, model = tmp_path / "weights.pth", tmp_path / "model.onnx"
    torch.save(importlib.import_module("two_biases").Gated(2).state_dict(), weights)
    wanted = ["--module", "two_biases:Gated", "--set", "seed=2", "--shape", "x:1x6", "--precision", precision]
    made = CliRunner().invoke(main, ["export", str(weights), *wanted, "-o", str(model)])
    assert made.exit_code == 0, made.output
    result = verify(model, "--against", weights, "--steps", "10", "--json")
    assert result.exit_code == 0, result.stderr
    says = {verdict["name"]: verdict["says"] for verdict in json.loads(result.stdout)["verdicts"]}
    assert "but for the rounding of weights that it combines" in says["identity"]


TWO_ORDERS = """
import torch
from torch import nn

class StateFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Conv2d(3 + 4, 4, 3, padding=1)

    def forward(self, x, h):
        h = torch.tanh(self.cell(torch.cat([x, h], 1)))
        return h, h.mean(1, keepdim=True)

class Clips(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Conv2d(3 + 4, 4, 3, padding=1)

    def forward(self, clip, h=None):
        if h is None:
            h = clip.new_zeros(clip.shape[0], 4, *clip.shape[3:])
        outputs = []
        for x in clip.unbind(1):
            h = torch.tanh(self.cell(torch.cat([x, h], 1)))
            outputs.append(h.mean(1, keepdim=True))
        return torch.stack(outputs, 1), h

class Cell(nn.Linear):
    def forward(self, x, h):
        return torch.tanh(super().forward(torch.cat([x, h], 1)))

class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = Cell(6 + 5, 5), nn.Linear(5, 2)

    def forward(self, clip):
        h, found = clip.new_zeros(clip.shape[0], 5), []
        for x in clip.unbind(1):
            h = self.cell(x, h)
            found.append(self.head(h))
        return torch.stack(found, 1)
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("StateFirst", ["--shape", "x:1x3x8x8", "--shape", "h:1x4x8x8", "--state", "h=0"]),
        ("Clips", ["--shape", "clip:1x1x3x8x8"]),
        ("Loop", ["--shape", "clip:1x4x6"]),
    ],
)
def test_how_a_module_was_called_is_in_its_contract(
    name: str, call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_orders.py").write_text(TWO_ORDERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    factory = getattr(importlib.import_module("two_orders"), name)
    weights, model = tmp_path / "weights.pth", tmp_path / "model.onnx"
    torch.save(factory().state_dict(), weights)
    wanted = ["--module", f"two_orders:{name}", *call, "--precision", "float32"]
    made = CliRunner().invoke(main, ["export", str(weights), *wanted, "-o", str(model)])
    assert made.exit_code == 0, made.output
    result = verify(model, "--against", weights, "--steps", "8", "--warm-up", "16", "--json")
    assert result.exit_code == 0, result.stderr
    says = {verdict["name"]: verdict["says"] for verdict in json.loads(result.stdout)["verdicts"]}
    assert "equals its source" in says["identity"]
