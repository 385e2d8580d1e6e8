"""Arguments that the tensors do not determine are inferred from `--shape`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from stepcell import StepLoop
from stepcell.cli import main
from stepcell.exporter import load_checkpoint, step_model


def export(folder: Path, *arguments: str) -> Result:
    words = ["export", folder / "m.pth", "-o", folder / "m.onnx", "--precision", "float32", *arguments]
    return CliRunner().invoke(main, [str(word) for word in words])


def gru(folder: Path, features: int) -> nn.GRU:
    torch.manual_seed(0)
    net = nn.GRU(features, 6, batch_first=True)
    torch.save(net.state_dict(), folder / "m.pth")
    return net


def test_rows_of_a_map(tmp_path: Path) -> None:
    net = gru(tmp_path, 3 * 5)
    result = export(tmp_path, "--family", "pooled_gru_heads", "--set", "head=rows", "--shape", "x:1x3x4x5")
    assert result.exit_code == 0, result.output
    x = torch.randn(1, 3, 4, 5)
    with torch.no_grad():
        expected, _ = net(x.permute(0, 2, 3, 1).flatten(2))
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        got = loop.step(x=x.numpy())["y"]
    assert np.abs(got - expected.numpy()).max() < 1e-5


def test_regions(tmp_path: Path) -> None:
    gru(tmp_path, 3)
    shapes = "x:1x3x8x9,roi_indices:1x4"
    result = export(tmp_path, "--family", "pooled_gru_heads", "--set", "head=roi", "--shape", shapes)
    assert result.exit_code == 0, result.output
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        assert [spec.shape for spec in loop.contract.outputs] == [(1, 4, 6)]


@pytest.fixture
def fcl(tmp_path: Path) -> Path:
    parts = {"conv1": nn.Conv2d(2, 3, 3), "fc": nn.Linear(3 * 6 * 8, 5), "lstm": nn.LSTM(5, 4)}
    torch.save(nn.ModuleDict(parts).state_dict(), tmp_path / "m.pth")
    return tmp_path


def test_the_map_of_a_linear_layer(fcl: Path) -> None:
    result = export(fcl, "--shape", "x:1x2x6x8")
    assert result.exit_code == 0, result.output
    assert "fc_spatial=[6, 8]" in result.output


def test_set_goes_before_shape_and_a_wrong_shape_is_refused(fcl: Path) -> None:
    model, _, used = step_model(load_checkpoint(fcl / "m.pth"), None, {"fc_spatial": [8, 6]}, {"x": (1, 2, 6, 8)})
    assert used["fc_spatial"] == [8, 6]
    assert model.inputs[0].shape[2:] == (8, 6)
    result = export(fcl, "--shape", "x:1x2x9x8")
    assert result.exit_code == 1
    assert "the linear layer reads 48 positions, got [9, 8]" in result.output
