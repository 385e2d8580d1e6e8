"""What frames of 1920x1080 cost on their way: by HTTP, gRPC and shared memory, beside the step alone."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stepcell import StepLoop
from stepcell.client import StreamClient
from stepcell.contract import METADATA_KEY, Spec, StateSpec, StepContract, TensorSpec
from stepcell.runtime.serving.wire import Wire
from tools.fleet.outcome import Outcome
from tools.fleet.servers import MODEL, Server, serving, write_repository

__all__ = ["shared_memory"]

SIZE = (1080, 1920)  # (height, width)
KINDS = 4  # different frames
WARM = 5
TARGET_MS = 10.0  # of a round trip by shared memory above the step


def shared_memory(folder: Path, port: int, log: Path, frames: int) -> Outcome:
    """One stream at a time. After each frame the same one is stepped here, so that other work meets both alike."""
    outcome = Outcome(
        "round trip of 1920x1080 pixels", f"by shared memory at most {TARGET_MS:g} ms above the step; answers are right"
    )
    model = _model(folder / "small.onnx")
    repository = write_repository(model, folder / "shared", "--slots", 1, "--batch-wait", "0ms")
    pictures = [np.random.default_rng(kind).integers(0, 256, (*SIZE, 3), np.uint8) for kind in range(KINDS)]
    lines, above = [], {}
    # One thread: those of ONNX Runtime spin after a step, on the cores that the server has then.
    alone = StepLoop.open(model, slots=1, threads=1, backend="onnxruntime")
    with serving(repository, port, log) as server, alone as loop:
        urls = {"http": server.url, "grpc": f"grpc://127.0.0.1:{server.grpc}"}
        for way in ("http", "grpc", "http with shared memory", "grpc with shared memory"):
            with StreamClient(urls[way[:4]], MODEL, shared_memory=way.endswith("memory"), timeout=60) as stream:
                there, here, cpu = _times(outcome, way, loop, stream, pictures, frames, server)
            above[way] = statistics.median(one - other for one, other in zip(there, here, strict=True))
            spread = statistics.quantiles((one - other for one, other in zip(there, here, strict=True)), n=10)
            lines.append(
                f"{way}: {statistics.median(there):.1f} ms, {above[way]:.1f} above the step of "
                f"{statistics.median(here):.1f} (a tenth is below {spread[0]:.1f}, a tenth above {spread[-1]:.1f}); "
                "CPU ms per frame: " + ", ".join(f"{name} {value:.1f}" for name, value in cpu.items())
            )
    for way, milliseconds in above.items():
        if way.endswith("memory"):
            outcome.require(milliseconds <= TARGET_MS, f"{way}: {milliseconds:.1f} ms above the step")
    outcome.seen = f"medians of {frames} frames; " + "; ".join(lines)
    return outcome


def _times(
    outcome: Outcome, way: str, loop: StepLoop, stream: StreamClient, pictures: list[Any], frames: int, server: Server
) -> tuple[list[float], list[float], dict[str, float]]:
    """Milliseconds of a round trip, and of the step here, for each frame; CPU time of each process, and of the step."""
    wire, slot = Wire(loop.contract, 1, pixels=True), loop.attach()
    there, here = [], []
    cpu = {"client": 0.0, "step alone": 0.0}
    for number in range(WARM + frames):
        if number == WARM:
            before = server.cpu()
        picture = pictures[number % KINDS]
        moments, used = [time.perf_counter()], [time.process_time()]
        answer = stream.step(x=picture)["y"]
        moments.append(time.perf_counter())
        used.append(time.process_time())
        outputs = loop.step_slots({slot: wire.to_model(0, {"x": picture[None]})})
        wanted = wire.to_client(0, outputs[slot])["y"][0]
        moments.append(time.perf_counter())
        used.append(time.process_time())
        outcome.require(np.array_equal(answer, wanted), f"{way}: frame {number} is wrong")
        if number >= WARM:
            there.append(1e3 * (moments[1] - moments[0]))
            here.append(1e3 * (moments[2] - moments[1]))
            cpu["client"] += 1e3 * (used[1] - used[0]) / frames
            cpu["step alone"] += 1e3 * (used[2] - used[1]) / frames
    loop.detach(slot)
    spent = {name: 1e3 * (after - before[name]) / frames for name, after in server.cpu().items()}
    return there, here, {**spent, **cpu}


def _model(path: Path) -> Path:
    """A model of bytes: y = x ^ h', h' = h + 1. So little is computed, and nothing converted, that the way shows."""
    picture: dict[str, Any] = {"shape": ("batch", "height", "width", 3), "layout": "NHWC", "dtype": "uint8"}
    contract = StepContract(
        inputs=(TensorSpec(name="x", **picture),),
        outputs=(TensorSpec(name="y", **picture),),
        states=(StateSpec(name="h", shape=("batch", 1, 1, 1)),),
        example={"batch": 1, "height": SIZE[0], "width": SIZE[1]},
    )
    nodes = [
        helper.make_node("Add", ["state_in.h", "one"], ["state_out.h"]),
        helper.make_node("Cast", ["state_out.h"], ["mask"], to=onnx.TensorProto.UINT8),
        helper.make_node("BitwiseXor", ["x", "mask"], ["y"]),
    ]
    values = {"one": np.array(1, np.float32)}
    graph = helper.make_graph(
        nodes,
        "small",
        [_info(name, spec) for name, spec in contract.graph_inputs.items()],
        [_info(name, spec) for name, spec in contract.graph_outputs.items()],
        initializer=[numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(made, {METADATA_KEY: contract.to_json()})
    onnx.save(made, path)
    return path


def _info(name: str, spec: Spec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)
