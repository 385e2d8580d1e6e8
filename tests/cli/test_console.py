"""The command line prints what the library logs while it runs, and only then."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from stepcell.cli.console import accept_every_name, echo, logs_printed, print_json, table

logger = logging.getLogger("stepcell.runtime.somewhere")


def test_logs_are_printed_within_a_command_only(capsys: pytest.CaptureFixture[str]) -> None:
    level, handlers = logging.getLogger("stepcell").level, list(logging.getLogger("stepcell").handlers)
    logger.info("before")
    with logs_printed():
        logger.info("within")
        logger.debug("too much")
    logger.info("after")
    assert capsys.readouterr().err == "within\n"
    assert logging.getLogger("stepcell").level == level
    assert logging.getLogger("stepcell").handlers == handlers


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """They are escaped, in JSON as JSON does it; the command used to end with a fault."""
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding=encoding))
    accept_every_name()
    print_json({"model": "dïr/漢.onnx"})
    sys.stdout.flush()
    assert json.loads(data.getvalue().decode(encoding)) == {"model": "dïr/漢.onnx"}
    end = len(data.getvalue())
    echo("漢")
    table("", ["", ""], [["漢", "x"]], to_stdout=True)
    sys.stdout.flush()
    shown = "漢" if encoding == "utf-8" else "\\u6f22"
    assert data.getvalue()[end:].decode(encoding).split() == [shown, shown, "x"]
