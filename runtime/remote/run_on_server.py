"""Runs streams on a server: what it says of its model, what it cannot do, and the run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from stepcell.errors import UsageError
from stepcell.runtime.remote.server_stepper import ServerStepper
from stepcell.runtime.serving.client import StreamClient, replay_length
from stepcell.runtime.serving.client_contract import ServedModel
from stepcell.runtime.serving.triton_transport import TritonTransport
from stepcell.runtime.streams.non_finite import OnNonFinite
from stepcell.runtime.streams.report import RunReport
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl

__all__ = ["run_on_server"]


def run_on_server(
    url: str,
    model: str | None,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    wait: float = 60.0,
    shared_memory: bool = False,
    on_nonfinite: OnNonFinite = "stop",
    control: RunControl | None = None,
    **options: Any,
) -> RunReport:
    """Step every frame of the inputs on a server that `stepcell triton-repo` set up, and write the answers.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`.
        model: its name on the server; None: the only one.
        inputs, outputs: as of `run_streams`, by name.
        wait: seconds without any answer after which a stream ends.
        shared_memory: as of `StreamClient`.
        on_nonfinite: as of `run_streams`; a server of tensors takes "stop".
        control: as of `run_streams`.
        options: of `run_streams`, apart from those that concern a loop on this machine.

    Raises:
        UsageError: a malformed URL, a model that is not on the server, or what it does not do.
        NotAnswered: the server is away.
        ContractError: what it says of its model is damaged, or of another version.
        MissingDependencyError: tritonclient is not installed.
        StepcellError: as of `run_streams`.
    """
    control = control or RunControl()
    name, served = _ask(url, model)
    if not served.pixels and on_nonfinite != "stop":
        raise UsageError(
            f"--on-nonfinite {on_nonfinite}: a server of tensors takes no NaN, and its states are not seen here",
            hint="omit it",
        )
    stepper = ServerStepper(
        lambda tell: StreamClient(
            url,
            name,
            deadline=wait,
            replay=replay_length(served.snapshot_every),
            shared_memory=shared_memory,
            on_event=tell,
        ),
        served.contract,
        name=name,
        description=f"Triton Inference Server, {url}",
        gives_pixels=served.pixels,
        control=control,
    )  # fmt: skip
    run = functools.partial(run_streams, stepper, inputs, outputs, control=control)
    return run(on_nonfinite=on_nonfinite, **options)


def _ask(url: str, model: str | None) -> tuple[str, ServedModel]:
    """The name of the model, and what the server says of it."""
    transport = TritonTransport(url, model or "")
    try:
        found = transport.models()
    finally:
        transport.close()
    if model is None and len(found) != 1:
        raise UsageError(
            f"--server {url}: has {len(found)} models: {', '.join(found) or 'none'}",
            hint=f"name one: stepcell run {found[0]} --server {url} ..." if found else None,
        )
    if model is not None and model not in found:
        raise UsageError(
            f"{model}: --server {url} has no model of this name: {', '.join(found) or 'none'}",
            hint="with --server, MODEL is a name on the server, not a file; it may be omitted where there is one",
        )
    name = model or found[0]
    transport = TritonTransport(url, name)
    try:
        return name, transport.served()
    finally:
        transport.close()
