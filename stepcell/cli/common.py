"""Helpers that several commands share: options, and the end of the process."""

from __future__ import annotations

import ast
import atexit
import contextlib
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import click

from stepcell.errors import StepcellError, UsageError
from stepcell.library_errors import as_stepcell_error, first_line, is_out_of_memory

__all__ = [
    "backend_option",
    "command_error",
    "joined",
    "json_option",
    "leaving",
    "no_check_option",
    "overwrite_option",
    "parse_settings",
    "parse_size",
]

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an existing file although another program wrote it; never an input."
)
backend_option = click.option(
    "--backend", type=click.Choice(["auto", "onnxruntime", "ncnn"]), default="auto", show_default=True,
    help="What computes an .onnx file on the CPU; auto: the faster one here, if ncnn is installed and can.",
)  # fmt: skip
no_check_option = click.option(
    "--no-check", "check_file", is_flag=True, flag_value=False, default=True,
    help="Take an ONNX file that was changed since its export.",
)  # fmt: skip


def joined(_ctx: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Callback of an option with shapes: given several times, it is one list."""
    return ",".join(values) if values else None


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` pairs; a value that is JSON or a Python literal is parsed, any other is a string.

    Raises:
        UsageError: a pair without `=`, or a repeated key.
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


def parse_size(text: str) -> tuple[int, int]:
    """`640x480` as (width, height).

    Raises:
        UsageError: another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise UsageError(f"--size: expected WIDTHxHEIGHT, got {text!r}", hint="such as 640x480")
    return int(match[1]), int(match[2])


def command_error(error: Exception) -> StepcellError:
    """The error that a command ends with: of stepcell, for want of memory, of the system, or a fault of stepcell.

    With STEPCELL_TRACEBACK=1 the stack is printed for one that is not of stepcell.
    """
    if isinstance(error, StepcellError):
        return error
    if os.environ.get("STEPCELL_TRACEBACK"):
        traceback.print_exception(error)
    if is_out_of_memory(error):
        return as_stepcell_error(error, "stepcell")
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return StepcellError(f"{where}{error.strerror or first_line(error)}")
    return StepcellError(
        f"fault of stepcell: {type(error).__name__}: {first_line(error)}",
        hint="please report it with the stack, which STEPCELL_TRACEBACK=1 prints",
    )


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """At exit, end the process at once if threads that were started in the block still run.

    A thread may be blocked in FFmpeg or in the kernel, such as by a silent camera or a disk that hangs. FFmpeg calls
    Python every 0.1 s to ask whether to go on, and crashes while the interpreter is finalised. So after everything
    else is closed, the process exits without finalising. A log that cannot be written does not change the exit code.
    """
    before, code = threading.enumerate(), 1
    try:
        yield
        code = 0
    except click.exceptions.Exit as end:
        code = end.exit_code
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except Exception as error:
        code = command_error(error).exit_code
        raise
    finally:
        left = [thread for thread in threading.enumerate() if thread not in before]
        atexit.register(_end, left, code)


def _end(threads: Sequence[threading.Thread], code: int) -> None:
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # Python would exit with another code then
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    running = sys._current_frames()  # is_alive() is wrong after a ctrl-C in join() before Python 3.13
    if any(thread.ident in running for thread in threads):
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):  # the result is lost
            code = code or 1
        os._exit(code)


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # False and (3, 5) are Python
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return text
