"""What all commands have in common: help, `python -m stepcell`, shell completion, files that are missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stepcell.cli import COMMANDS, main
from tests.cli.command import call


@pytest.mark.parametrize("command", ["", "kernels compile", *(name for name in COMMANDS if name != "kernels")])
def test_help_has_examples_on_lines_of_their_own(command: str) -> None:
    pytest.importorskip("torch")  # the help of `export` names the families
    result = CliRunner().invoke(main, [*command.split(), "--help"])
    assert result.exit_code == 0, result.output
    assert "\\b" not in result.output
    assert "\b" not in result.output
    examples = [line for line in result.output.splitlines() if re.match(" +stepcell ", line)]
    assert examples, result.output


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "stepcell", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: stepcell [OPTIONS] COMMAND")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer to `stepcell run --on-<tab>`, as the lines of docs/index.md make a shell ask for it."""
    words, current = ("stepcell run --on-", "2") if shell != "fish" else ("stepcell run", "--on-")
    monkeypatch.setitem(os.environ, "_STEPCELL_COMPLETE", f"{shell}_complete")
    monkeypatch.setitem(os.environ, "COMP_WORDS", words)
    monkeypatch.setitem(os.environ, "COMP_CWORD", current)
    with pytest.raises(SystemExit) as end:
        main(prog_name="stepcell")
    assert end.value.code == 0
    assert "--on-nonfinite" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "export none.pth",
        "fuse none.onnx -o new.onnx",
        "build none.onnx",
        "run none.onnx -i clip.npy",
        "map none.onnx -i none.npy -o out",
        "verify none.onnx",
        "verify none.engine",
        "bench none.onnx",
        "compare none.npy none.npy",
        "compare none.onnx none.onnx",
        "inspect none.onnx",
        "events none.raw",
    ],
)
def test_a_file_that_is_missing(arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message and one exit code, whichever command it is."""
    monkeypatch.chdir(tmp_path)
    result = call(*arguments.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"error: none\.\w+: .*\(No such file or directory\)\n(hint: .*\n)?", result.stderr), (
        result.stderr
    )
