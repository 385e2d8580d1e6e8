"""Suppression of log messages of other libraries during a call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["errors_only"]


@contextlib.contextmanager
def errors_only(*loggers: str) -> Iterator[None]:
    """Let these loggers report nothing below an error, such as a remark on every node that an optimizer skips."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
