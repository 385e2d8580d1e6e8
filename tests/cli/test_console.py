"""The command line prints what the library logs while it runs, and only then."""

from __future__ import annotations

import logging

import pytest

from stepcell.cli.console import logs_printed

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
