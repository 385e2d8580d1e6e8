"""Commands in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from stepcell.cli import main

__all__ = ["call", "run"]


def run(*arguments: object) -> Result:
    """The result of `stepcell run`."""
    return call("run", *arguments)


def call(*arguments: object) -> Result:
    """The result of a command; an exception other than an exit fails the test."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
