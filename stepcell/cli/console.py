"""Console output of the command line: progress and summaries to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepcell.errors import OutputError
from stepcell.files import human_size

__all__ = ["console", "log", "logs_printed", "print_json", "stage", "table", "working"]

HEARTBEAT_SECONDS = 10.0
_FILE_WIDTH = 1000  # of a log, whose lines are searched and not looked at: a path stays whole


class _Log(Console):
    """A console that ignores write errors: a closed pipe or a full disk does not end the work."""

    def on_broken_pipe(self) -> None:  # rich ends the process here
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


console = _Log(stderr=True, highlight=False, soft_wrap=True, emoji=False)  # `:x:` in a path is no emoji


def log(message: str) -> None:
    """One line to stderr, for a person."""
    console.print(message, markup=False)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            log(record.getMessage())
        except Exception:  # as logging asks of a handler
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
    """The summary line that ends a stage: what was done, to which file, size, time."""
    size = human_size(Path(path).stat().st_size) if Path(path).is_file() else ""
    log(f"{verb:<8} {path!s:<28} {size:>9}  {seconds:6.1f} s  {detail}".rstrip())


def table(title: str, columns: list[str], rows: list[list[str]], *, to_stdout: bool = False) -> None:
    """A table for a person; results that were asked for go to stdout."""
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
        grid.add_row(*map(Text, row))  # as it is: `stepcell[rtx]` is no markup
    output = (Console if to_stdout else _Log)(highlight=False, stderr=not to_stdout)
    if not output.is_terminal:
        output.width = _FILE_WIDTH
    output.print(grid)


def print_json(result: Mapping[str, Any] | msgspec.Struct) -> None:
    """A result for a machine, to stdout."""
    if sys.stdout is None:
        raise OutputError("stdout: is closed")
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(result), indent=1).decode() + "\n")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that a long call is alive: a spinner with the elapsed time, or a line every ten
    seconds where stderr is not a terminal. TensorRT reports no usable progress of its own.
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
