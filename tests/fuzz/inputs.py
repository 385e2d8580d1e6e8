"""What is fuzzed: for each kind of input its seeds, made by code, and what the program does with such a file."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stepcell.contract import StepContract
from tests.fuzz.mutate import (
    Mutator,
    mutate_bytes,
    mutate_json,
    mutate_onnx,
    mutate_safetensors,
    mutate_zip,
    sealing,
)

__all__ = ["INPUTS", "Input"]

SHAPE: list[Any] = ["batch", 3, "height", "width"]
CONTRACT: dict[str, Any] = {
    "schema": "1.0",
    "family": "module",
    "precision": "float32",
    "inputs": [{"name": "x", "shape": SHAPE, "dtype": "float32", "layout": "NCHW", "range": [0.0, 1.0],
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "pad_multiple": 2}],
    "outputs": [{"name": "y", "shape": SHAPE, "layout": "NCHW", "range": [0.0, 1.0]}],
    "states": [{"name": "h", "shape": SHAPE, "dtype": "float32", "batch_axis": 0, "init": "zeros"}],
    "cells": [{"name": "cell", "op": None, "hidden": 3, "kernel": [1, 1], "reason": "a test"}],
    "example": {"batch": 1, "height": 8, "width": 8},
    "source": {"arguments": {"hidden": 3}, "onnx_sha256": "0" * 64},
    "parity": {"steps": 32, "reference": "torch float64", "max_abs_error": {"y": 0.0}},
}  # fmt: skip
EVENTS = {
    "representation": "voxel_grid",
    "bins": 3,
    "polarity": "signed",
    "window": {"size": 30000.0, "unit": "us"},
    "normalise": True,
}


@dataclass(frozen=True)
class Input:
    """A kind of input.

    Attributes:
        seeds: valid files.
        suffix: of the file that `use` gets.
        use: reads a file and works with it; may raise errors of stepcell only.
        mutate: a changed file.
        cost: of one case, relative to the others; it divides their number in a quick run.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    suffix: str
    use: Callable[[Path], object]
    mutate: Mutator = mutate_bytes
    cost: int = 1


def _contracts() -> list[bytes]:
    events = json.loads(json.dumps(CONTRACT))
    events["inputs"][0] |= {"events": EVENTS, "range": None, "mean": None, "std": None}
    learned = json.loads(json.dumps(CONTRACT))
    learned["states"][0]["init"] = {"shape": [3, 1, 1], "dtype": "float32", "data": "AACAPwAAgD8AAIA/"}
    whole = StepContract.from_json(json.dumps(CONTRACT)).to_sealed_json()
    return [json.dumps(each).encode() for each in (CONTRACT, events, learned)] + [whole.encode()]


def _use_contract(path: Path) -> None:
    from stepcell.runtime.engine.options import BuildOptions
    from stepcell.runtime.engine.profile import derive_profiles
    from stepcell.runtime.loop.snapshot import contract_hash
    from stepcell.runtime.media.preprocess import Preprocessor, event_input, image_input

    contract = StepContract.from_json(path.read_bytes(), check=False)
    contract_hash(contract)
    StepContract.from_json(contract.to_sealed_json())
    derive_profiles(contract, BuildOptions())
    spec = image_input(contract)
    event_input(spec)
    frame = np.zeros((3, 9, 9), np.float32) if spec.events else np.zeros((9, 9, int(spec.shape[1])), np.uint8)
    tensor = Preprocessor(spec, frame)(frame)
    shapes = contract.state_shapes(contract.bind({spec.name: tensor.shape}))
    for state in contract.states:
        if np.prod(shapes[state.name], dtype=float) < 1e6:
            state.initial(shapes[state.name])


def _models() -> list[bytes]:
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)

    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["z"]),
        helper.make_node("Twice", ["z", "state_in.h"], ["y"], domain="own"),
        helper.make_node("Tanh", ["y"], ["state_out.h"]),
    ]
    inner = [helper.make_node("Mul", ["a", "b"], ["m"]), helper.make_node("Add", ["m", "b"], ["o"])]
    twice = helper.make_function("own", "Twice", ["a", "b"], ["o"], inner, opsets[:1])
    weights = [
        numpy_helper.from_array(np.full((3, 3, 3, 3), 0.1, np.float32), "w"),
        helper.make_tensor("b", TensorProto.FLOAT, [3], [0.0, 0.1, 0.2]),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x"), value("state_in.h")], [value("y"), value("state_out.h")], weights
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=9)
    helper.set_model_props(model, {"stepcell.contract": json.dumps(CONTRACT)})
    return [model.SerializeToString()]


def _use_model(path: Path) -> None:
    from stepcell.runtime.evaluate.evaluator import GraphEvaluator
    from stepcell.runtime.loop.step_loop import StepLoop

    x = np.full((1, 3, 8, 8), 0.5, np.float32)
    with StepLoop.open(path, check_file=False, threads=1) as loop:
        for _ in range(2):
            loop.step(x=x)
    GraphEvaluator(path, check_file=False)


def _use_build(path: Path) -> None:
    """What a build does before TensorRT parses the model."""
    from stepcell.onnx_model import read_onnx
    from stepcell.plugins.onnx.rewrite import plugin_model
    from stepcell.plugins.prepare import unchanged
    from stepcell.runtime.engine.onnx_input import check_graph

    file = read_onnx(path, check=False)
    plugin_model(file.model, file.contract.states)
    check_graph(unchanged(file), lambda _: True)


def _foreign() -> list[bytes]:
    from onnx import ModelProto

    model = ModelProto.FromString(_models()[0])
    del model.metadata_props[:]
    return [model.SerializeToString()]


def _use_foreign(path: Path) -> None:
    from stepcell.exporter.from_onnx.fuse import fuse

    fuse(path, path.with_name("fused.onnx"), shapes={"x": (1, 3, 8, 8)}, overwrite=True)


def _snapshots() -> list[bytes]:
    from stepcell.runtime.loop.snapshot import Snapshot, contract_hash, write_snapshot

    contract = StepContract.from_json(json.dumps(CONTRACT))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        states = {"h": np.zeros((1, 3, 8, 8), np.float32)}
        write_snapshot(path, states, Snapshot(contract_hash=contract_hash(contract), frame=7, slots={"a": 0}, rows=2))
        return [path.read_bytes()]


def _use_snapshot(path: Path) -> None:
    from stepcell.runtime.loop.snapshot import read_snapshot

    read_snapshot(path, StepContract.from_json(json.dumps(CONTRACT)))


def _checkpoint() -> dict[str, Any]:
    import torch

    from stepcell.models.zoo.denoiser import Denoiser

    torch.manual_seed(0)
    return Denoiser(hidden=2).state_dict()


def _torch_files(*, archive: bool) -> list[bytes]:
    import torch

    found = []
    weights = _checkpoint()
    average = list(weights.values())
    training = {"state_dict": weights, "ema": {"shadow_params": average}, "epoch": 3, "optimizer": {"state": {}}}
    for content in (weights, training):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=archive)
        found.append(buffer.getvalue())
    return found


def _safetensors() -> list[bytes]:
    from safetensors.torch import save

    from stepcell.models.checkpoint_writer import ARGUMENTS_KEY, FAMILY_KEY

    weights = _checkpoint()
    half = {name: value.half() for name, value in weights.items()}
    return [save(weights), save(half, {FAMILY_KEY: "denoiser", ARGUMENTS_KEY: '{"hidden": 2}'})]


def _use_checkpoint(path: Path) -> None:
    from stepcell.exporter.from_checkpoint.checkpoint import load_checkpoint
    from stepcell.exporter.from_checkpoint.step_model import family_model

    family_model(load_checkpoint(path))


CUBIN = b"cubin"


def _kernels() -> list[bytes]:
    from stepcell.plugins.kernels.image import SCHEMA, Argument, ImageInfo, KernelImage, write_image

    info = ImageInfo(
        schema=SCHEMA, key="key", source="", kernel="lstm_step", cell="", tile="", capability="8.7", entry="entry",
        warps=4, shared_bytes=50000, registers=0, tensor_core_instructions=0, spill_instructions=0, grid_pixels=32,
        grid_channels=5, max_pixels=100, triton="",
        arguments=(Argument("x", "x", 0, 8), Argument("P", "P", 8, 4)),
        sha256=hashlib.sha256(CUBIN).hexdigest(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return [write_image(KernelImage(info, CUBIN), Path(folder)).with_suffix(".json").read_bytes()]


def _use_kernel(path: Path) -> None:
    from stepcell.plugins.kernels.image import is_outdated, read_image

    path.with_suffix(".cubin").write_bytes(CUBIN)
    is_outdated(path)
    info = read_image(path).info
    info.all_partial_bytes(info.tiles(100))


PLAN = b"plan"


def _sidecars() -> list[bytes]:
    from stepcell.runtime.engine.options import BuildOptions
    from stepcell.runtime.engine.profile import derive_profiles
    from stepcell.runtime.engine.sidecar import Fingerprint, Sidecar, Verification

    contract, digest = StepContract.from_json(json.dumps(CONTRACT)), hashlib.sha256(PLAN).hexdigest()
    fingerprint = Fingerprint(
        flavor="tensorrt-rtx", tensorrt="1.7.1", compute_capabilities=("8.6",), platform="Linux-x86_64",
        plugin_version=None, plugin_sha256=None, onnx_sha256="0" * 64, plan_sha256=digest, plan_bytes=len(PLAN),
    )  # fmt: skip
    verified = Verification(
        passed=True, date="2026-01-01T00:00:00", device="GPU", compute_capability="8.6", driver="1", tensorrt="1.7.1",
        steps=8, input="noise", reference="float64", stepcell="1.0", plan_sha256=digest,
    )  # fmt: skip
    options = BuildOptions()
    sidecar = Sidecar(
        onnx="model.onnx", fingerprint=fingerprint, profiles=derive_profiles(contract, options), options=options,
        compute_layers={"Half": 2}, build_seconds=1.0, contract=contract, verified=(verified,),
    )  # fmt: skip
    return [sidecar.to_json().encode()]


def _use_sidecar(path: Path) -> None:
    from stepcell.runtime.engine.engine_check import covers, read_engine
    from stepcell.runtime.engine.sidecar import rebuild_command, require_verified

    engine = path.with_suffix("")
    engine.write_bytes(PLAN)
    _, sidecar = read_engine(engine)
    rebuild_command(sidecar, engine, compute_capability="8.7")
    covers(sidecar.fingerprint.compute_capabilities, "8.7")
    require_verified(sidecar, engine, device="GPU", driver="1")


def _arrays() -> list[bytes]:
    return [_saved(np.zeros((3, 8, 8, 3), np.uint8)), _saved(np.zeros((2, 3, 8, 8), np.float32))]


def _saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _use_array(path: Path) -> None:
    from stepcell.runtime.media.npy_file import ArraySource

    for number, _ in enumerate(ArraySource(path)):
        if number > 10:
            break


def _npz() -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        steps = np.arange(64)
        save(buffer, x=steps % 8, y=steps // 8, p=steps % 2, t=steps * 1000, width=8, height=8)  # type: ignore[operator]
        found.append(buffer.getvalue())
    return found


def _dat() -> list[bytes]:
    head = b"% Data file containing CD events\n% Version 2\n% Width 8\n% Height 8\n\x0c\x08"
    return [head + b"".join(struct.pack("<II", 1000 * n, n % 8 | n // 8 << 14) for n in range(64))]


def _raw() -> list[bytes]:
    evt2 = [8 << 28 | 1, *((n % 2) << 28 | n << 22 | (n % 8) << 11 | n % 8 for n in range(40)), 8 << 28 | 900]
    evt3 = [0x8001, *(word for n in range(40) for word in (0x6000 | n, n % 8, 0x2000 | n % 8))]
    return [
        b"% evt 2.0\n% geometry 8x8\n% end\n" + struct.pack(f"<{len(evt2)}I", *evt2),
        b"% evt 3.0\n% format EVT3;width=8;height=8\n% end\n" + struct.pack(f"<{len(evt3)}H", *evt3),
        b"% evt 2.1\n% geometry 8x8\n% end\n" + b"".join(struct.pack("<II", 1, half) for half in evt2),
    ]


def _text() -> list[bytes]:
    head = ["%geometry:8,8", "x,y,p,t"]
    return ["\n".join([*head, *(f"{n % 8},{n // 8},{n % 2},{n * 1000}" for n in range(64))]).encode()]


def _use_events(path: Path) -> None:
    import msgspec

    from stepcell.event_spec import EventSpec
    from stepcell.runtime.media.events.source import EventSource

    source = EventSource(path, msgspec.convert(EVENTS, EventSpec))
    try:
        if max(source.size) <= 2000:
            for number, _ in enumerate(source):
                if number > 10:
                    break
    finally:
        source.close()


def _videos() -> list[bytes]:
    import av

    found = []
    for form in ("mp4", "matroska", "avi"):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=form) as out:
            stream = out.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 16
            for value in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * value, np.uint8), "rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        found.append(buffer.getvalue())
    return found


def _use_video(path: Path) -> None:
    from stepcell.runtime.media.video_reader import VideoSource

    source = VideoSource(str(path))
    try:
        for number, _ in enumerate(source):
            if number > 10:
                break
    finally:
        source.close()


CHECKSUM = b'"checksum": "'
INPUTS = (
    Input("contract", _contracts, ".json", _use_contract, sealing(mutate_json, CHECKSUM)),
    Input("onnx", _models, ".onnx", _use_model, mutate_onnx, cost=10),
    Input("build", _models, ".onnx", _use_build, mutate_onnx, cost=2),
    Input("fuse", _foreign, ".onnx", _use_foreign, mutate_onnx, cost=100),
    Input("checkpoint", partial(_torch_files, archive=True), ".pth", _use_checkpoint, mutate_zip, cost=4),
    Input("old-checkpoint", partial(_torch_files, archive=False), ".pth", _use_checkpoint, cost=4),
    Input("safetensors", _safetensors, ".safetensors", _use_checkpoint, mutate_safetensors, cost=4),
    Input("sidecar", _sidecars, ".engine.json", _use_sidecar, sealing(mutate_json, CHECKSUM)),
    Input("snapshot", _snapshots, ".safetensors", _use_snapshot, sealing(mutate_bytes, b'\\"checksum\\":\\"')),
    Input("kernel", _kernels, ".json", _use_kernel, sealing(mutate_json, CHECKSUM)),
    Input("npy", _arrays, ".npy", _use_array),
    Input("npz", _npz, ".npz", _use_events, mutate_zip, cost=2),
    Input("dat", _dat, ".dat", _use_events, cost=2),
    Input("raw", _raw, ".raw", _use_events, cost=2),
    Input("event-text", _text, ".csv", _use_events, cost=2),
    Input("video", _videos, ".mp4", _use_video, cost=10),
)
