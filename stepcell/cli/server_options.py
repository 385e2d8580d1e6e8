"""Options of `stepcell run` for steps on a server, and those that say how a model runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from stepcell.cli.clip_options import no_nan
from stepcell.errors import UsageError

__all__ = ["refuse_local", "refuse_without_server", "server_options"]

_F = TypeVar("_F", bound=Callable[..., Any])

_DEVICE = "the server's machine steps the frames; stepcell triton-repo --device chose it"
_OPENED = "the server opened the model; it is checked there"
_SNAPSHOTS = "the states are the server's, which writes snapshots: stepcell triton-repo --snapshots"
_PIXELS = "the contract of the served model says it: declare it in the file (stepcell fuse), and serve that"
_LOCAL = {
    **dict.fromkeys(("device", "allow_fallback", "keep_float16", "threads", "backend"), _DEVICE),
    **dict.fromkeys(("check_file", "require_verified"), _OPENED),
    **dict.fromkeys(("snapshot", "snapshot_every", "resume"), _SNAPSHOTS),
    **dict.fromkeys(("pixel_range", "mean", "std", "channels", "layout"), _PIXELS),
}

_OPTIONS = (
    click.option(
        "--server", metavar="URL",
        help="Step on a server of `stepcell triton-repo`: http://HOST:PORT or grpc://HOST:PORT. MODEL is the name of a "
        "model there then, and may be omitted where there is one.",
    ),
    click.option(
        "--server-wait", type=click.FloatRange(0, min_open=True), callback=no_nan, default=60.0, show_default=True,
        metavar="SECONDS", help="A stream whose server does not answer for this long ends.",
    ),
    click.option(
        "--shared-memory", is_flag=True,
        help="Pass frames and answers through memory that the server, on this machine, shares.",
    ),
)  # fmt: skip


def server_options(command: _F) -> _F:
    """Add --server, --server-wait and --shared-memory to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_without_server(context: click.Context) -> None:
    """Raise UsageError for an option of a server, given on the command line without one."""
    for name in ("server_wait", "shared_memory"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} needs --server URL")


def refuse_local(context: click.Context) -> None:
    """Raise UsageError for an option, given on the command line, that says how a model runs on this machine."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name in _LOCAL:
            raise UsageError(f"{parameter.opts[-1]} with --server: {_LOCAL[parameter.name]}", hint="omit it")
