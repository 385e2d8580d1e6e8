"""`stepcell kernels compile` as a user calls it; what it writes is tested in test_compile.py."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from stepcell.cli import main


@pytest.mark.slow
def test_the_cells_of_a_model_are_compiled(stack_onnx: Path, tmp_path: Path) -> None:
    command = ["kernels", "compile", str(stack_onnx), "--compute-capability", "8.7", "--json"]
    found = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "new")])
    assert found.exit_code == 0, found.output
    kernels = json.loads(found.stdout)["kernels"]
    assert {(k["kernel"], k["cell"]) for k in kernels} == {
        ("narrow_state", "gru_x3_h6_k3x3_soft_float32"),
        ("gru_gates", "gru_x3_h6_k3x3_soft_float32"),
        ("gru_candidate", "gru_x3_h6_k3x3_soft_float32"),
        ("narrow_state", "lstm_x6_h4_k1x5_soft_float32"),
        ("lstm_step", "lstm_x6_h4_k1x5_soft_float32"),
    }
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        f"{k['key']}.{suffix}" for k in kernels for suffix in ("cubin", "json")
    }


def test_refusals_and_their_exit_codes(stack_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(stack_onnx)
    for node in model.graph.node:
        node.domain = ""
    onnx.save(model, tmp_path / "none.onnx")
    for arguments, code, message in [
        (["--compute-capability", "7.5"], 2, "no tensor-core instructions"),
        (["--compute-capability", "8.7,"], 2, "expected one of"),
        (["--compute-capability", "8.7", "--cell", "gru"], 2, "cannot read 'gru'"),
        (["--compute-capability", "8.7", str(tmp_path / "missing.onnx")], 1, "missing.onnx"),
        (["--compute-capability", "8.7", str(tmp_path / "none.onnx")], 1, "has no stepcell::ConvGRU"),
        ([], 2, "--compute-capability"),
    ]:
        result = CliRunner().invoke(main, ["kernels", "compile", "-o", str(tmp_path), *arguments])
        assert result.exit_code == code, (arguments, result.output)
        assert message in result.output, (arguments, result.output)
