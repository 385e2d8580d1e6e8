"""The bound of the error in the contract: derived where the model forgets, absent with a warning where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from stepcell import StateSpec, TensorSpec
from stepcell.cli import main
from stepcell.exporter import export_onnx
from stepcell.exporter.module_step import module_step
from stepcell.models import CellStack, conv_lstm_stack, save_checkpoint
from stepcell.runtime.evaluate import GraphEvaluator
from stepcell.runtime.verify.clips import random_clip


def stack(gain: float) -> CellStack:
    """Two ConvLSTM cells; with large random weights a change of the last digit grows from step to step."""
    torch.manual_seed(0)
    made = conv_lstm_stack(2, [6, 6], [3, 3])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * gain)
    return made.eval()


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_model_that_amplifies_rounding_is_exported_without_a_bound(precision: str, tmp_path: Path) -> None:
    parity = export_onnx(stack(0.6), tmp_path / "m.onnx", precision=precision, shapes={"x": (1, 2, 8, 8)}).parity  # type: ignore[arg-type]
    assert parity is not None
    assert parity.rho is not None
    assert parity.rho > 1
    assert parity.memory is parity.bound is None
    if precision == "float16":
        assert max(parity.max_abs_error.values()) > 2e-2, "the error that is stored is the real one"


def test_the_bound_holds_for_a_thousand_steps(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", stack(0.05)
    contract = export_onnx(model, path, shapes={"x": (1, 2, 8, 8)})
    parity = contract.parity
    assert parity is not None
    assert parity.bound is not None
    assert parity.memory == pytest.approx(1 / (1 - (parity.rho or 0)))
    assert list(parity.bound) == list(parity.max_abs_error) == list(parity.rms_error)
    file, exact, clip = GraphEvaluator(path), module_step(model, contract), random_clip(contract, {}, count=1000)
    own = true = file.initial_states({"x": (1, 2, 8, 8)})
    for frame in clip.frames:
        (outputs, own), (truth, true) = file.step(frame, own), exact(frame, true)
        for name, limit in parity.bound.items():
            error = np.asarray({**outputs, **own}[name], float) - {**truth, **true}[name]
            assert np.sqrt(np.mean(error**2)) <= limit


def test_export_and_inspect_say_it(tmp_path: Path) -> None:
    arguments = {"input_size": 2, "hidden_sizes": [6, 6], "kernel_sizes": [3, 3]}
    for gain, says in (
        (0.6, "warning: no error bound exists: what was changed in the states grows"),
        (0.05, "the states remember"),
    ):
        save_checkpoint(stack(gain), tmp_path / "m.safetensors", family="convlstm", arguments=arguments)
        words = ["export", tmp_path / "m.safetensors", "-o", tmp_path / "m.onnx", "--shape", "x:1x2x8x8", "--json"]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        assert says in result.stderr
        assert ("warning" in result.stderr) is (gain > 0.5)
        assert (json.loads(result.stdout)["parity"]["bound"] is None) is (gain > 0.5)
        shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.onnx")])
        assert says.removeprefix("warning: ") in " ".join(shown.stdout.split())


class Spikes(nn.Module):
    """Leaky integrate and fire: rounding puts a potential on the other side of the threshold."""

    def __init__(self, leak: float = 0.9) -> None:
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", 64))]
        self.outputs = [TensorSpec(name="y", shape=("batch", 64))]
        self.states = [StateSpec(name="h", shape=("batch", 64))]
        self.mix = nn.Linear(64, 64, bias=False)
        self.leak = leak

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        charged = self.leak * h + 4 * self.mix(x).to(h.dtype)
        spikes = (charged > 1).to(h.dtype)
        return spikes.to(x.dtype), charged - spikes


def test_states_that_jump_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parity = export_onnx(Spikes(), tmp_path / "m.onnx").parity
    assert parity is not None
    assert parity.max_abs_error["y"] == 1.0, "some spike is early or late"
    assert parity.rho == pytest.approx(0.9)
    assert parity.bound is None, "the derivative of a jump says nothing of it"
