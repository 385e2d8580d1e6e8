"""Command `stepcell triton-repo`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from stepcell.cli.common import joined, json_option, overwrite_option
from stepcell.cli.console import log, print_json
from stepcell.errors import InputError, UsageError
from stepcell.files import human_size

if TYPE_CHECKING:
    from stepcell.contract import StepContract

_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


@click.command(
    epilog="""\b
Examples:
  stepcell triton-repo model.onnx -o repo
  stepcell triton-repo model.onnx -o repo --slots 8 --instances 2 --snapshots /srv/snapshots --snapshot-every 30
  stepcell triton-repo model.engine -o repo --slots 16 --server 10.0.0.5 --server 10.0.0.6
  stepcell triton-repo model.onnx -o repo --implicit-state --shape x:1x3x480x640
  repo/serve.sh
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Folder to write."
)
@click.option("--name", help="Name of the model on the server.  [default: that of the file]")
@click.option(
    "--slots", type=click.IntRange(1, 1024), default=4, show_default=True, metavar="N",
    help="Streams of one instance: every step computes this many rows.",
)  # fmt: skip
@click.option(
    "--instances", type=click.IntRange(1, 64), default=1, show_default=True, metavar="M",
    help="Processes of one server, each with slots of its own.",
)  # fmt: skip
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda for an engine, cpu for an .onnx]")
@click.option(
    "--frames", type=click.Choice(["pixels", "tensors"]),
    help="How frames are sent and answered: pixels (H, W, C) uint8, or the model's tensors.  "
    "[default: pixels, if the model takes one picture of a declared range]",
)  # fmt: skip
@click.option(
    "--idle", "idle_text", default="30s", show_default=True, metavar="TIME",
    help="A stream without frames for this long gives its slot to a new one.",
)  # fmt: skip
@click.option(
    "--batch-wait", "wait_text", default="20ms", show_default=True, metavar="TIME",
    help="A frame waits for those of other streams for at most this long.",
)  # fmt: skip
@click.option(
    "--snapshots", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Write states of streams there; servers that share the folder take over each other's streams.",
)  # fmt: skip
@click.option(
    "--snapshot-every", type=click.IntRange(1), default=30, show_default=True, metavar="K",
    help="Frames from one snapshot of a stream to the next.",
)  # fmt: skip
@click.option(
    "--keep", "keep_text", default="24h", show_default=True, metavar="TIME",
    help="Snapshots of streams that ended without a word are removed after this time.",
)  # fmt: skip
@click.option(
    "--server", "servers", multiple=True, metavar="HOST[:HTTP:GRPC]",
    help="A server for haproxy.cfg; may be repeated.  [default: 127.0.0.1:8000:8001]",
)  # fmt: skip
@click.option(
    "--implicit-state", is_flag=True,
    help="For Triton's own ONNX Runtime or TensorRT back end (the latter not run), with the states in the server's "
    "memory: without what stepcell promises.",
)  # fmt: skip
@click.option(
    "--shape", "--shapes", "shape", multiple=True, callback=joined, metavar="x:1x3x256x256",
    help="Sizes of a frame, for --implicit-state, where the model leaves them open.",
)  # fmt: skip
@overwrite_option
@json_option
def command(
    model: Path,
    output: Path,
    name: str | None,
    slots: int,
    instances: int,
    device: str | None,
    frames: Literal["pixels", "tensors"] | None,
    idle_text: str,
    wait_text: str,
    snapshots: Path | None,
    snapshot_every: int,
    keep_text: str,
    servers: tuple[str, ...],
    implicit_state: bool,
    shape: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server, for MODEL, an .onnx or an engine.

    Clients send the frames of their streams with stepcell.client (docs/fleet.md). A frame is answered from the state of
    exactly the frames before it, or by a named error. Streams share batches, and survive the end of a server by
    snapshots. The folder gets the models, haproxy.cfg for several servers, and serve.sh, which starts a server and
    watches it.

    With --implicit-state Triton's own back end steps the model, and holds the states: frames that are lost, repeated or
    overtaken are not noticed, and a state ends with the server, or without an END.
    """
    from stepcell.runtime.loop.open_backend import ENGINE_SUFFIXES
    from stepcell.runtime.serving.repository import Address, Repository
    from stepcell.runtime.serving.settings import Settings
    from stepcell.runtime.serving.wire import takes_pixels

    contract = _contract(model)
    engine = model.suffix.lower() in ENGINE_SUFFIXES
    place = device or ("cuda" if engine else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", place) is None:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {place!r}")
    model_name = name or re.sub(r"[^A-Za-z0-9_.-]", "_", model.stem)
    if implicit_state:
        _refuse(frames="pixels" if frames == "pixels" else None, snapshots=snapshots, server=servers)
        _write_implicit_state(
            model, contract, output, model_name, shape, slots, place, instances,
            idle=_seconds(idle_text, "--idle"), wait=_seconds(wait_text, "--batch-wait", least=0),
            overwrite=overwrite, as_json=as_json,
        )  # fmt: skip
        return
    if shape is not None:
        raise UsageError("--shape: is for --implicit-state; stepcell's own model takes the sizes of the first frame")
    pixels = takes_pixels(contract, slots) if frames is None else frames == "pixels"
    settings = Settings(
        model=model.name,
        slots=slots,
        device=place,
        pixels=pixels,
        idle=_seconds(idle_text, "--idle"),
        snapshots="" if snapshots is None else str(snapshots.absolute()),
        snapshot_every=snapshot_every,
        keep=_seconds(keep_text, "--keep"),
    )
    repository = Repository(
        source=model,
        contract=contract,
        folder=output,
        name=model_name,
        settings=settings,
        instances=instances,
        batch_wait=_seconds(wait_text, "--batch-wait", least=0),
        servers=[Address.parse(each) for each in servers or ("127.0.0.1",)],
    )
    written = repository.write(overwrite=overwrite)
    state = _state_bytes(contract)
    log(f"frames:    {'pixels' if pixels else 'tensors'}, {slots} slots in {instances} instance{'s' * (instances > 1)}")
    if snapshots is None:
        log("snapshots: none: a stream is lost with its server (--snapshots FOLDER)")
    else:
        size = "" if state is None else f", {human_size(state)} each at the size of the export"
        log(f"snapshots: {settings.snapshots}, every {snapshot_every} frames{size}")
    log(f"wrote:     {output} ({len(written)} files); start a server with {output / 'serve.sh'}")
    if as_json:
        print_json({
            "name": repository.name,
            "files": [str(path) for path in written],
            "frames": "pixels" if pixels else "tensors",
            "state_bytes": state,
        })  # fmt: skip


def _refuse(**options: object) -> None:
    """Refuse options that Triton's own back ends have nothing for."""
    reasons = {
        "frames": "the model's own tensors are sent, of its type and range",
        "snapshots": "nothing writes the states, which are in the server's memory",
        "server": "a stream cannot go on at another server",
    }
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name} with --implicit-state: {reasons[name]}", hint="without --implicit-state it can")


def _write_implicit_state(
    model: Path,
    contract: StepContract,
    output: Path,
    name: str,
    shape: str | None,
    slots: int,
    device: str,
    instances: int,
    *,
    idle: float,
    wait: float,
    overwrite: bool,
    as_json: bool,
) -> None:
    from stepcell.runtime.engine.sidecar import read_sidecar
    from stepcell.runtime.loop.open_backend import ENGINE_SUFFIXES
    from stepcell.runtime.serving.implicit_state import ImplicitStateRepository
    from stepcell.shapes import parse_shapes

    engine = model.suffix.lower() in ENGINE_SUFFIXES
    repository = ImplicitStateRepository(
        source=model,
        contract=contract,
        sidecar=read_sidecar(model) if engine else None,
        folder=output,
        name=name,
        shapes=parse_shapes(shape, option="--shape") if shape else {},
        slots=slots,
        device=device,
        instances=instances,
        idle=idle,
        batch_wait=wait,
    )
    written, checked = repository.write(overwrite=overwrite)
    log(f"frames:    {repository.tensors()}")
    names = ", ".join(state.name for state in contract.states)
    log(
        f"states:    {names}: in the server's memory, lost with it or after {idle:g} s without a frame; a lost, "
        "repeated or overtaken frame is not noticed (docs/fleet.md)"
    )
    log(
        f"config:    {'fits' if checked else 'not compared with'} the server's schema"
        f"{'' if checked else ' (the package stepcell[client] has it)'}"
        f"{'; not run by stepcell: no server with TensorRT was at hand' if engine else ''}"
    )
    log(f"wrote:     {output} ({len(written)} files)")
    if as_json:
        print_json({"name": name, "files": [str(path) for path in written], "frames": "tensors", "schema": checked})


def _contract(model: Path) -> StepContract:
    from stepcell.onnx_model import read_onnx
    from stepcell.runtime.engine.engine_check import read_engine
    from stepcell.runtime.loop.open_backend import ENGINE_SUFFIXES

    suffix = model.suffix.lower()
    if suffix == ".onnx":
        return read_onnx(model).contract
    if suffix in ENGINE_SUFFIXES:
        return read_engine(model)[1].contract
    raise InputError(f"{model}: expected an .onnx file or an engine ({', '.join(ENGINE_SUFFIXES)})")


def _seconds(text: str, option: str, *, least: float = 1e-3) -> float:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)(ms|s|min|h)", text)
    if match is None or float(match[1]) * _SECONDS[match[2]] < least:
        raise UsageError(f"{option}: expected a time, got {text!r}", hint="such as 2ms, 30s, 5min or 24h")
    return float(match[1]) * _SECONDS[match[2]]


def _state_bytes(contract: StepContract) -> int | None:
    """Bytes of the states of one stream at the sizes of the export; None: they are not known."""
    import numpy as np

    batch = {dim: 1 for state in contract.states if isinstance(dim := state.streams, str)}
    if set(contract.symbols) - set(contract.example) - set(batch):
        return None
    shapes = contract.state_shapes(contract.example | batch)
    rows = {state.streams for state in contract.states if isinstance(state.streams, int)}
    total = sum(int(np.prod(shapes[state.name])) * np.dtype(state.dtype).itemsize for state in contract.states)
    return total // max(rows, default=1)
