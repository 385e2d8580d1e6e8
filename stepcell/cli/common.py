"""What several commands share."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import click

from stepcell.errors import UsageError

__all__ = ["json_option", "parse_settings"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; a value that is JSON or a Python literal is taken as such, anything else as a string.

    Raises:
        UsageError: no `=`, or a key twice.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set: expected KEY=VALUE, got {setting!r}")
        if key in parsed:
            raise UsageError(f"--set {key}: given twice")
        parsed[key] = _value(value)
    return parsed


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # False and (3, 5) stand in upstream's Python
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return text
