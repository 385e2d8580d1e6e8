"""What several commands share."""

from __future__ import annotations

import ast
import atexit
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import click

from stepcell.errors import StepcellError, UsageError

__all__ = ["json_option", "leaving", "parse_settings"]

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


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Threads that the block leaves behind do not see Python being taken down when the process ends; nor does a log
    that cannot be written change the exit code.

    A thread may be in FFmpeg or in the kernel for longer than anybody waits: a camera that is silent, a
    disk that hangs. FFmpeg asks Python every 0.1 s whether to go on, and crashes where Python is half
    gone. So the process ends at once then, when everything else has been closed and said.
    """
    before, code = threading.enumerate(), 1
    try:
        yield
        code = 0
    except click.exceptions.Exit as end:
        code = end.exit_code
        raise
    except StepcellError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        left = [thread for thread in threading.enumerate() if thread not in before]
        atexit.register(_end, left, code)


def _end(threads: Sequence[threading.Thread], code: int) -> None:
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # nobody listens, for which Python has an exit code of its own
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    running = sys._current_frames()  # unlike is_alive(), which says no after a ctrl-C in join() before Python 3.13
    if any(thread.ident in running for thread in threads):
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):  # what was asked for is not there
            code = code or 1
        os._exit(code)


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # False and (3, 5) stand in upstream's Python
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return text
