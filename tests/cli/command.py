"""Commands in this process."""

from __future__ import annotations

import importlib.util

import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main

WITHOUT_TORCH = importlib.util.find_spec("torch") is None

__all__ = ["call", "run"]


def run(*arguments: object) -> Result:
    """The result of `stepcell run`."""
    return call("run", *arguments)


def call(*arguments: object) -> Result:
    """The result of a command; an exception other than an exit fails the test.

    Without torch, the test is skipped at a command that needs it.
    """
    if WITHOUT_TORCH and arguments[0] in ("export", "fuse"):
        pytest.skip(f"`stepcell {arguments[0]}` needs torch")
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
