"""Arguments that the tensors do not determine are inferred from `--shape`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from stepcell import StepLoop
from stepcell.cli import main
from stepcell.dims import resolve, symbols_of
from stepcell.errors import UsageError
from stepcell.exporter import FAMILIES, export_onnx, load_checkpoint, step_model


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


# Every family with several inputs; a new one is added here.
SEVERAL_INPUTS: dict[str, dict[str, Any]] = {
    "pooled_gru_heads": {"input_size": 3, "hidden_size": 4, "head": "roi", "regions": 2},
    "raft_stereo_convgru": {"hidden_dim": 4, "input_dim": 5, "inputs": [3, 2]},
    "raft_update_block": {"target": "SmallUpdateBlock", "corr_levels": 1, "corr_radius": 1, "hidden_dim": 4},
    "rvm_decoder": {"feature_channels": [2, 3, 4, 6], "decoder_channels": [4, 6, 2, 3]},
}


def all_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    symbols = symbols_of(dim for spec in model.inputs for dim in spec.shape)
    sizes = {**dict.fromkeys(symbols, 17), "batch": 2, **getattr(model, "examples", {})}
    return {spec.name: resolve(spec.shape, sizes) for spec in model.inputs}


@pytest.mark.parametrize("family", SEVERAL_INPUTS)
def test_all_inputs_fixed_in_any_order(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build(**SEVERAL_INPUTS[family])
    shapes = all_shapes(model)
    assert len(shapes) > 1
    backwards = dict(reversed(shapes.items()))
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32", shapes=backwards)
    assert contract.symbols == []
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        types = {spec.name: np.dtype(spec.dtype) for spec in contract.inputs}
        outputs = loop.step(**{name: np.zeros(shape, types[name]) for name, shape in shapes.items()})
    assert {name: array.shape for name, array in outputs.items()} == {s.name: s.shape for s in contract.outputs}


def test_a_shape_that_leaves_the_frame_unknown(tmp_path: Path) -> None:
    model = FAMILIES["rvm_decoder"].build(**SEVERAL_INPUTS["rvm_decoder"])
    with pytest.raises(UsageError, match=r"--shape f1: its shape .* follows from height, which has no value"):
        export_onnx(model, tmp_path / "m.onnx", shapes={"f1": (1, 2, 9, 9)})
