"""Console output of the command line, the only user of rich: progress and summaries to stderr, results to stdout.

All text passes `displayed` here: names, doc strings and tags of a file never steer the terminal, and secrets of URLs
are hidden.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stepcell.display import displayed
from stepcell.errors import OutputError, StepcellError
from stepcell.files import human_size
from stepcell.json_text import json_text

__all__ = [
    "LiveTable",
    "accept_every_name",
    "console",
    "echo",
    "log",
    "logs_printed",
    "print_error",
    "print_json",
    "stage",
    "table",
    "working",
]

HEARTBEAT_SECONDS = 10.0
_FILE_WIDTH = 1000  # columns of a table that goes to a file: paths are not wrapped


class _Log(Console):
    """A console that ignores write errors: a closed pipe or a full disk does not end the work."""

    def on_broken_pipe(self) -> None:  # rich would end the process
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


console = _Log(stderr=True, highlight=False, soft_wrap=True, emoji=False)  # `:x:` may be part of a path


def log(message: str) -> None:
    """Print a line to stderr."""
    console.print(displayed(message), markup=False)


def print_error(error: StepcellError) -> None:
    """Print an error and its hint to stderr."""
    log(f"error: {error.message}")
    if error.hint:
        log(f"hint:  {error.hint}")


def echo(text: str) -> None:
    """Print a line of the result to stdout."""
    _write(displayed(text) + "\n")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            log(record.getMessage())
        except Exception:  # required by logging
            self.handleError(record)


@contextlib.contextmanager
def logs_printed() -> Iterator[None]:
    """Print what the library logs; loggers are as before afterwards."""
    logger, handler = logging.getLogger("stepcell"), _Handler()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def stage(verb: str, path: Path | str, seconds: float, detail: str = "") -> None:
    """Print the summary of a stage: verb, path, size of the file, duration."""
    size = human_size(Path(path).stat().st_size) if Path(path).is_file() else ""
    log(f"{verb:<8} {path!s:<28} {size:>9}  {seconds:6.1f} s  {detail}".rstrip())


def table(title: str, columns: list[str], rows: list[list[str]], *, to_stdout: bool = False) -> None:
    """Print a table to stderr, or to stdout if it is the result of the command."""
    grid = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=any(columns),
    )
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*map(_cell, row))
    output = (Console if to_stdout else _Log)(highlight=False, stderr=not to_stdout)
    if not output.is_terminal:
        output.width = _FILE_WIDTH
    output.print(grid)


class LiveTable:
    """A table on a terminal that is redrawn in place. All columns but the first are aligned to the right."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self._live = Live(console=console, auto_refresh=False)

    def update(self, rows: Sequence[Sequence[str]]) -> None:
        """Draw the table with these rows."""
        grid = Table(box=None, pad_edge=False)
        grid.add_column(self._columns[0], overflow="ellipsis", no_wrap=True, max_width=40)
        for column in self._columns[1:]:
            grid.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            grid.add_row(*map(_cell, row))
        self._live.start()
        self._live.update(grid, refresh=True)

    def stop(self) -> None:
        """Leave the table as it was drawn last."""
        self._live.stop()


def print_json(result: Mapping[str, Any] | msgspec.Struct) -> None:
    """Print a result as JSON to stdout.

    Raises:
        OutputError: it cannot be written, such as to a full disk.
    """
    text = json_text(result)
    if sys.stdout is not None:
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(json.loads(text), indent=1)  # \u00e9 for an e with an accent
    _write(text + "\n")


def accept_every_name() -> None:
    """Let stdout escape what its encoding does not have, as stderr does, such as other letters in an ASCII terminal."""
    if sys.stdout is not None and getattr(sys.stdout, "errors", None) == "strict":
        with contextlib.suppress(AttributeError):  # a stand-in for stdout
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _cell(text: str) -> Text:
    return Text(displayed(text))  # not markup: `stepcell[rtx]`


def _write(text: str) -> None:
    if sys.stdout is None:
        raise OutputError("stdout: is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # Python would report it once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"stdout: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Context manager that shows the elapsed time of a long call: a spinner in a terminal, otherwise a line every ten
    seconds. TensorRT reports no usable progress.
    """
    started = time.monotonic()
    done = threading.Event()

    def beat(status: Any = None) -> None:
        while not done.wait(0.2 if status else HEARTBEAT_SECONDS):
            text = f"{what} ... {time.monotonic() - started:.0f} s"
            status.update(text) if status else log(text)

    with console.status(what) if console.is_terminal else contextlib.nullcontext() as status:
        thread = threading.Thread(target=beat, args=(status,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
