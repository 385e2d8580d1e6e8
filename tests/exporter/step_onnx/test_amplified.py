"""A model that amplifies rounding is exported with a warning, and its contract says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from stepcell.cli import main
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, conv_lstm_stack, save_checkpoint


def chaotic(gain: float) -> CellStack:
    """Two ConvLSTM cells with large random weights: a change of the last digit grows from step to step."""
    torch.manual_seed(0)
    stack = conv_lstm_stack(2, [6, 6], [3, 3])
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape) * gain)
    return stack.eval()


@pytest.mark.parametrize(("gain", "amplified"), [(0.05, False), (0.6, True)])
def test_the_contract_says_whether_rounding_is_amplified(gain: float, amplified: bool, tmp_path: Path) -> None:
    contract = export_onnx(chaotic(gain), tmp_path / "m.onnx", shapes={"x": (1, 2, 8, 8)})
    assert contract.parity is not None
    worst = max(contract.parity.max_abs_error.values())
    print(f"gain {gain}: worst error {worst:.2g}")
    assert contract.parity.amplified is amplified
    assert (worst > 2e-2) is amplified, "the error that is stored is the real one"


def test_export_warns(tmp_path: Path) -> None:
    arguments = {"input_size": 2, "hidden_sizes": [6, 6], "kernel_sizes": [3, 3]}
    save_checkpoint(chaotic(0.6), tmp_path / "m.safetensors", family="convlstm", arguments=arguments)
    words = ["export", tmp_path / "m.safetensors", "-o", tmp_path / "m.onnx", "--shape", "x:1x2x8x8", "--json"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "warning: this model amplifies rounding" in result.stderr
    assert "--precision float32" in result.stderr
    assert json.loads(result.stdout)["parity"]["amplified"] is True
