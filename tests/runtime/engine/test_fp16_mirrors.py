"""Fp16 mirrors of states as tensors of an engine that TensorRT-RTX builds without a GPU.

It cannot host the plugin, so convolutions that read and write the mirror take its place. The list of the engine's
kernels shows what TensorRT adds around such tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import ModelProto, helper, numpy_helper

from stepcell.errors import ContractError
from stepcell.onnx_model import read_onnx
from stepcell.plugins.fp16_mirrors import Fp16Mirror, engine_tensors
from stepcell.plugins.onnx.rewrite import plugin_model
from stepcell.plugins.prepare import PreparedModel, unchanged
from stepcell.runtime.engine import plan
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.plan import BuiltPlan, build_plan
from stepcell.runtime.engine.profile import derive_profiles
from stepcell.runtime.engine.sidecar import read_sidecar, sidecar_path
from stepcell.runtime.engine.tensorrt_module import TensorRT
from stepcell.seal import sealed

MIRRORS = (Fp16Mirror("h", "half_in.h", "half_out.h"),)
OPTIONS = BuildOptions(
    compute_capabilities=("8.9",), min_shapes={"x": (1, 3, 32, 32)}, max_shapes={"x": (2, 3, 64, 64)}, verbose=True
)


def stand_in(path: Path) -> PreparedModel:
    """The denoiser as it is prepared for the plugin, with convolutions in the plugin's place."""
    file = read_onnx(path)
    changed = plugin_model(file.model, file.contract.states)
    assert changed.fp16_mirrors == MIRRORS
    model, random = changed.model, np.random.default_rng(0)
    node = next(node for node in model.graph.node if node.domain)
    x, h, half, h_next, y = *node.input[:3], *node.output
    assert (half, y) == ("half_in.h", "half_out.h")
    for name in ("w_x", "w_h"):
        weight = random.standard_normal((8, 8, 3, 3)).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    nodes = [
        helper.make_node("Conv", [x, "w_x"], ["a"], "of_x", pads=[1] * 4),
        helper.make_node("Conv", [half, "w_h"], ["b"], "of_h", pads=[1] * 4),
        helper.make_node("Add", ["a", "b"], ["narrow"]),
        helper.make_node("Cast", ["narrow"], ["wide"], to=1),
        helper.make_node("Add", ["wide", h], [h_next]),
        helper.make_node("Cast", [h_next], [y], to=10),
    ]
    listed = [each for old in model.graph.node for each in (nodes if old.domain else [old])]
    del model.graph.node[:]
    model.graph.node.extend(listed)
    return with_mirrors(with_model(unchanged(file), model), MIRRORS)


def with_mirrors(prepared: PreparedModel, mirrors: tuple[Fp16Mirror, ...]) -> PreparedModel:
    inputs, outputs = engine_tensors(read_onnx(prepared.path).contract, mirrors)
    return dataclasses.replace(prepared, inputs=inputs, outputs=outputs, fp16_mirrors=mirrors)


def with_model(prepared: PreparedModel, model: ModelProto) -> PreparedModel:
    onnx.checker.check_model(model)
    return dataclasses.replace(prepared, model=model, data=model.SerializeToString())


def build(prepared: PreparedModel) -> BuiltPlan:
    library, contract = TensorRT("tensorrt-rtx", tensorrt_rtx), read_onnx(prepared.path).contract
    return build_plan(library, prepared, derive_profiles(contract, OPTIONS), OPTIONS, None)


@pytest.fixture
def kernels_of(
    monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> Callable[[PreparedModel], list[tuple[str, str]]]:
    """Name and text of every kernel of an engine."""
    original = plan._configure

    def detailed(trt: Any, *rest: Any) -> Any:
        config = original(trt, *rest)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        return config

    monkeypatch.setattr(plan, "_configure", detailed)

    def kernels(prepared: PreparedModel) -> list[tuple[str, str]]:
        logged.clear()
        built = build(prepared)
        assert built.source == prepared
        assert set(built.profiles) == {"x", "state_in.h", "half_in.h"}
        listing = next(line for line in logged.messages if "Layers:" in line)
        return re.findall(r"^Name: (\S+), (LayerType: .*)$", listing, re.MULTILINE)

    return kernels


def test_nothing_is_put_around_a_fp16_mirror(
    denoiser_onnx: Path, kernels_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = stand_in(denoiser_onnx)
    found = kernels_of(prepared)
    (reader,) = [text for name, text in found if name.startswith("of_h") or "of_h]" in text]
    (tensor,) = re.findall(r"Name: half_in\.h, .*?Format: (.*?) ", reader)
    assert tensor == "(NHWC)", reader
    (writer,) = [
        text.partition("Outputs:")[2] for _, text in found if "Name: half_out.h" in text.partition("Outputs:")[2]
    ]
    assert re.findall(r"Name: half_out\.h, .*?Format: (.*?) ", writer) == ["(NHWC)"], writer
    print(len(found), [name for name, _ in found])

    # What it would cost to do otherwise: the copy beside y instead of y itself, and formats left to TensorRT.
    beside = onnx.ModelProto()
    beside.CopyFrom(prepared.model)
    for node in beside.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = "inner" if name == "half_out.h" else name
    beside.graph.node.append(helper.make_node("Identity", ["inner"], ["half_out.h"]))
    assert len(kernels_of(with_model(prepared, beside))) > len(found)
    monkeypatch.setattr(plan, "_fix_formats", lambda *_: None)
    assert len(kernels_of(prepared)) > len(found)


def test_a_network_without_its_fp16_mirrors_is_refused(denoiser_onnx: Path) -> None:
    prepared = stand_in(denoiser_onnx)
    with pytest.raises(ContractError, match=r"differ in inputs: .*half_in\.h against x, state_in\.h$"):
        build(with_mirrors(prepared, ()))
    with pytest.raises(ContractError, match=r"differ in inputs: x, state_in\.h against x, state_in\.h, half_in\.h"):
        build(with_mirrors(unchanged(read_onnx(denoiser_onnx)), MIRRORS))
    wide = onnx.ModelProto()
    wide.CopyFrom(prepared.model)
    port = next(each for each in wide.graph.input if each.name == "half_in.h")
    port.type.tensor_type.elem_type = 1
    node = next(each for each in wide.graph.node if "half_in.h" in each.input)
    cast = helper.make_node("Cast", ["half_in.h"], ["halved"], to=10)
    node.input[0] = "halved"
    wide.graph.node.insert(0, cast)
    with pytest.raises(ContractError, match=r"half_in\.h: float32 in TensorRT's network, float16 in the contract"):
        build(with_model(prepared, wide))


def test_fp16_mirrors_stand_in_the_sidecar(denoiser_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    build_engine(denoiser_onnx, path)
    sidecar = read_sidecar(path)
    assert sidecar.schema == "1.2"
    assert not sidecar.fp16_mirrors
    sidecar_path(path).write_text(msgspec.structs.replace(sidecar, fp16_mirrors=MIRRORS).to_json())
    document = msgspec.json.decode(sidecar_path(path).read_bytes())
    assert document["half_copies"] == [{"state": "h", "input": "half_in.h", "output": "half_out.h"}]
    assert read_sidecar(path).fp16_mirrors == MIRRORS
    # a sidecar of before them is read as it was
    old = sidecar_path(path).read_text().replace('"schema": "1.2"', '"schema": "1.0"', 1)
    start = old.index(' "half_copies"')
    old = old[:start] + old[old.index(' "checksum"') :]
    blank = re.sub(r'"checksum": "\w+"', f'"checksum": "{"0" * 64}"', old)
    sidecar_path(path).write_bytes(sealed(blank.encode(), b'"checksum": "'))
    assert (read_sidecar(path).schema, read_sidecar(path).fp16_mirrors) == ("1.0", ())
