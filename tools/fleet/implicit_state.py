"""A server with the ONNX Runtime back end and a repository of `triton-repo --implicit-state`: does it step as a loop?

    python -m tools.fleet.implicit_state --server tritonserver --backends FOLDER MODEL.onnx [...] --output F.json

No package has this back end for CPUs; docs/fleet.md says how one was built from its sources. Each MODEL is stepped for
several streams at once, each in a thread with a client of its own, and every answer is compared with a loop that steps
one stream alone. Run by the environment of tools/fleet/requirements.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from stepcell import StepLoop
from stepcell.contract import StepContract
from stepcell.dims import resolve
from stepcell.onnx_model import read_onnx
from stepcell.shapes import format_shapes
from tools.fleet.outcome import Outcome

STREAMS, FRAMES, IDLE = 4, 40, 3
SIDE = 32  # of a frame
SLACK = 1e-5  # of values near 1: a batch is summed up in another order than one stream
Frame = dict[str, NDArray[Any]]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--server", required=True, help="the program tritonserver")
    parser.add_argument("--backends", required=True, type=Path, help="folder that has onnxruntime/")
    parser.add_argument("--port", type=int, default=18200)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="stepcell-implicit") as name:
        for number, model in enumerate(options.models):
            folder = Path(name, str(number))
            outcome = _model(model, folder, options.server, options.backends, options.port)
            outcomes.append(outcome)
            print(f"{outcome.name}: {outcome.broken or 'held'}\n    {outcome.seen}", flush=True)
    if options.output:
        document = {
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                **{
                    each: importlib.metadata.version(each)
                    for each in ("nvidia-pytriton", "tritonclient", "onnxruntime")
                },
            },
            "outcomes": [asdict(each) for each in outcomes],
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(any(outcome.broken for outcome in outcomes))


def _model(model: Path, folder: Path, server: str, backends: Path, port: int) -> Outcome:
    contract = read_onnx(model).contract
    batch = {dim: 1 for state in contract.states if isinstance(dim := state.streams, str)}
    sizes = {**{symbol: contract.example.get(symbol, SIDE) for symbol in contract.symbols}, **batch}
    sizes |= {symbol: SIDE for symbol in ("height", "width") if symbol in sizes}
    shapes = {spec.name: resolve(spec.shape, sizes) for spec in contract.inputs}
    states = ", ".join(f"{state.name}{'' if state.init == 'zeros' else ' (not zero)'}" for state in contract.states)
    outcome = Outcome(
        f"{contract.family} {contract.precision}, states {states}",
        "every answer is that of a loop; a stream that was idle is refused, and START begins anew",
    )
    slots = STREAMS if batch else 1
    command = [sys.executable, "-m", "stepcell", "triton-repo", model, "-o", folder, "--implicit-state", "--name", "m"]
    command += ["--slots", slots, "--shape", format_shapes(shapes), "--idle", f"{IDLE}s", "--batch-wait", "5ms"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    with _serving(folder / "models", server, backends, port):
        answers: dict[int, list[Frame]] = {}
        threads = [
            threading.Thread(target=_stream, args=(port, contract, shapes, seed, answers)) for seed in range(slots)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        worst, equal, total = 0.0, 0, 0
        for seed in range(slots):
            wanted = _alone(model, shapes, seed)
            outcome.require(len(answers.get(seed, [])) == FRAMES, f"stream {seed}: an answer is missing")
            for one, other in zip(answers.get(seed, []), wanted, strict=False):
                worst = max(worst, *(float(np.abs(one[name] - other[name]).max()) for name in other))
                equal += all(np.array_equal(one[name], other[name]) for name in other)
                total += 1
        outcome.require(worst <= SLACK, f"an answer differs by {worst:.2g}")
        refusal, again = _idle(port, contract, shapes, _alone(model, shapes, 0)[0])
        outcome.require("START" in refusal, f"after the idle time: {refusal!r}")
        outcome.require(again <= SLACK, f"after START: {again:.2g}")
    outcome.seen = (
        f"{slots} streams, {total} answers, {equal} equal bit by bit, the largest difference {worst:.2g}; "
        f"idle for {IDLE + 2} s: {refusal[:90]!r}"
    )
    return outcome


@contextlib.contextmanager
def _serving(models: Path, server: str, backends: Path, port: int) -> Iterator[None]:
    ports = [f"--{kind}-port={port + number}" for number, kind in enumerate(("http", "grpc", "metrics"))]
    hosts = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
    log = models.parent / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [server, f"--model-repository={models}", f"--backend-directory={backends}", *ports, *hosts],
            stdout=file,
            stderr=file,
        )
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(Exception):
                if client.is_model_ready("m"):
                    break
            time.sleep(0.2)
        yield
    finally:
        client.close()
        process.terminate()
        process.wait()


def _frames(contract: StepContract, shapes: dict[str, tuple[int, ...]], seed: int) -> list[Frame]:
    rng = np.random.default_rng(seed)
    return [
        {spec.name: rng.random(shapes[spec.name]).astype(spec.dtype) for spec in contract.inputs} for _ in range(FRAMES)
    ]


def _send(client: Any, frame: Frame, stream: int, *, start: bool = False, end: bool = False) -> Frame:
    inputs = []
    for name, array in frame.items():
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    answer = client.infer("m", inputs, sequence_id=stream, sequence_start=start, sequence_end=end)
    return {each["name"]: answer.as_numpy(each["name"]) for each in answer.get_response()["outputs"]}


def _stream(
    port: int, contract: StepContract, shapes: dict[str, tuple[int, ...]], seed: int, answers: dict[int, list[Frame]]
) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=300)
    found = answers[seed] = []
    for number, frame in enumerate(_frames(contract, shapes, seed)):
        found.append(_send(client, frame, seed + 1, start=number == 0, end=number == FRAMES - 1))
    client.close()


def _idle(port: int, contract: StepContract, shapes: dict[str, tuple[int, ...]], first: Frame) -> tuple[str, float]:
    """A stream that is idle for too long: the error of its next frame, and how its next first answer differs."""
    client = triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=300)
    frames = _frames(contract, shapes, 0)
    for number, frame in enumerate(frames[:3]):
        _send(client, frame, 99, start=number == 0)
    time.sleep(IDLE + 2)
    try:
        _send(client, frames[3], 99)
        refusal = ""
    except InferenceServerException as error:
        refusal = str(error)
    answer = _send(client, frames[0], 99, start=True)
    client.close()
    return refusal, max(float(np.abs(answer[name] - first[name]).max()) for name in first)


def _alone(model: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> list[Frame]:
    with StepLoop.open(model, threads=1, backend="onnxruntime", keep_float16=True) as loop:
        return [loop.step(**frame) for frame in _frames(loop.contract, shapes, seed)]


if __name__ == "__main__":
    main()
