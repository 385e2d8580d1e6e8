"""Parity check of an export: computes float16 as the file says, and float32 in ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from stepcell import StateSpec, TensorSpec, export_onnx
from stepcell.contract import METADATA_KEY, StepContract
from stepcell.exporter.arithmetic import AS_WRITTEN, IN_ONNX_RUNTIME
from stepcell.runtime.evaluate.registry import OPERATORS


def contract_of(path: Path) -> StepContract:
    text = next(entry.value for entry in onnx.load(path).metadata_props if entry.key == METADATA_KEY)
    return StepContract.from_json(text)


def test_the_contract_says_how_the_file_was_computed(denoiser_onnx: Path, denoiser_onnx_float32: Path) -> None:
    for path, arithmetic in ((denoiser_onnx, AS_WRITTEN), (denoiser_onnx_float32, IN_ONNX_RUNTIME)):
        parity = contract_of(path).parity
        assert parity is not None
        assert (parity.reference, parity.arithmetic) == ("torch float64", arithmetic)


class Memory(nn.Module):
    """h <- h + 0.001 (1 - h) from 0.9, computed in the dtype of x: in float16 it never moves."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", 4))]
        self.outputs = [TensorSpec(name="y", shape=("batch", 4))]
        self.states = [StateSpec(name="h", shape=("batch", 4))]
        self.initial = {"h": torch.full((4,), 0.9)}
        self.rate = nn.Parameter(torch.tensor([0.001]))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        narrow = h.to(x.dtype)
        new = narrow + self.rate * (1 - narrow)
        return x + new, new.to(h.dtype)


def test_a_state_that_stalls_in_float16_shows_in_the_figures(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider drops the cast, so its error was that of the weight 0.001 alone: below 1e-4."""
    parity = export_onnx(Memory(), tmp_path / "memory.onnx").parity
    assert parity is not None
    lost = 0.1 * (1 - 0.999**32)
    assert parity.max_abs_error["h"] == pytest.approx(lost, rel=0.2)


def test_an_operator_that_the_evaluator_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(OPERATORS, "Sub")
    with caplog.at_level(logging.WARNING):
        parity = export_onnx(Memory(), tmp_path / "memory.onnx").parity
    assert parity is not None
    assert parity.arithmetic == IN_ONNX_RUNTIME
    assert parity.max_abs_error["h"] < 1e-4
    assert "operator Sub is not implemented; the file is checked in ONNX Runtime" in caplog.text
