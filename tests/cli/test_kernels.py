"""Refusals of `stepcell kernels compile`; the files it writes are tested in test_compile.py."""

from __future__ import annotations

from pathlib import Path

import onnx
from click.testing import CliRunner

from stepcell.cli import main


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
