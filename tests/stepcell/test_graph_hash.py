"""The hash of graph and weights, and the refusal of a file that has changed since its export."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from stepcell import StepLoop
from stepcell.contract import METADATA_KEY
from stepcell.errors import ContractError, InputError
from stepcell.graph_hash import graph_sha256
from stepcell.onnx_model import changes_since_export, read_onnx
from stepcell.runtime.engine.build import build_engine


def model() -> ModelProto:
    """y = relu(x + w) with a branch, a function and an attribute of every common kind."""
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(np.ones(2, np.float32), "b"))],
        "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    nodes = [
        helper.make_node("Add", ["x", "w"], ["s"], "add"),
        helper.make_node("If", ["flag"], ["i"], "if", then_branch=branch, else_branch=branch),
        helper.make_node("Clip", ["s", "low"], ["c"], "clip"),
        helper.make_node("Twice", ["c"], ["d"], "twice", domain="mine", factor=2.0),
        helper.make_node("Add", ["d", "i"], ["y"], "end"),
    ]
    values = {"w": np.array([1, 2], np.float32), "low": np.float32(0), "flag": np.ones((), bool)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )  # fmt: skip
    body = [
        helper.make_node("Constant", [], ["k"]),
        helper.make_node("Mul", ["a", "k"], ["b"]),
    ]
    body[0].attribute.add(name="value_float", ref_attr_name="factor", type=onnx.AttributeProto.FLOAT)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    twice = helper.make_function("mine", "Twice", ["a"], ["b"], body, opsets[:1], ["factor"])
    made = helper.make_model(graph, functions=[twice], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made)
    return made


def other_weights_order(m: ModelProto) -> None:
    copies = [TensorProto.FromString(t.SerializeToString()) for t in reversed(m.graph.initializer)]
    del m.graph.initializer[:]
    m.graph.initializer.extend(copies)


def typed_weights(m: ModelProto) -> None:
    w = m.graph.initializer[0]
    w.ClearField("raw_data")
    w.float_data.extend([1, 2])


def other_spellings(m: ModelProto) -> None:
    m.graph.node[0].domain = "ai.onnx"
    m.graph.node[2].input.append("")
    m.graph.node[0].doc_string = "a comment"
    m.producer_name, m.graph.name = "somebody", "else"
    m.graph.value_info.add().CopyFrom(helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n", 2]))
    m.metadata_props.add(key="author", value="somebody")


@pytest.mark.parametrize("change", [other_weights_order, typed_weights, other_spellings])
def test_hash_does_not_depend_on_how_a_file_is_written(change: Callable[[ModelProto], None]) -> None:
    changed = model()
    change(changed)
    assert changed.SerializeToString() != model().SerializeToString()
    assert graph_sha256(changed) == graph_sha256(model())


def _set_weight(m: ModelProto) -> None:
    m.graph.initializer[0].raw_data = np.array([1, np.nextafter(np.float32(2), np.float32(3))], np.float32).tobytes()


def _set_branch(m: ModelProto) -> None:
    m.graph.node[1].attribute[1].g.node[0].attribute[0].t.raw_data = np.zeros(2, np.float32).tobytes()


CHANGES: dict[str, Callable[[ModelProto], object]] = {
    "a weight": _set_weight,
    "shape of a weight": lambda m: m.graph.initializer[0].dims.insert(0, 1),
    "a weight more": lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(1), "spare")),
    "an operator": lambda m: setattr(m.graph.node[0], "op_type", "Mul"),
    "a domain": lambda m: setattr(m.graph.node[0], "domain", "mine"),
    "an input of a node": lambda m: m.graph.node[0].input.__setitem__(0, "w"),
    "two inputs swapped": lambda m: m.graph.node[0].input.sort(),
    "a node less": lambda m: m.graph.node.pop(),
    "a name": lambda m: setattr(m.graph.node[0], "name", "plus"),
    "an attribute": lambda m: setattr(m.graph.node[3].attribute[0], "f", 3.0),
    "an attribute less": lambda m: m.graph.node[3].attribute.pop(),
    "a constant in a branch": _set_branch,
    "a function": lambda m: setattr(m.functions[0].node[1], "op_type", "Add"),
    "a function less": lambda m: m.functions.pop(),
    "a size of an input": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1),
    "a dtype of an output": lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.FLOAT16),
    "an opset": lambda m: setattr(m.opset_import[0], "version", 21),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hash_changes_with(name: str) -> None:
    changed = model()
    CHANGES[name](changed)
    assert graph_sha256(changed) != graph_sha256(model())


@pytest.fixture
def edited(denoiser_onnx: Path, tmp_path: Path) -> Path:
    """One bit of one weight differs from the export."""
    found = onnx.load(denoiser_onnx)
    weights = found.graph.initializer[0]
    data = bytearray(weights.raw_data)
    data[4] ^= 1
    weights.raw_data = bytes(data)
    onnx.save(found, tmp_path / "edited.onnx")
    return tmp_path / "edited.onnx"


def test_edited_file_is_refused_and_opens_where_it_is_meant(edited: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="changed since export: its graph or its weights") as refused:
        StepLoop.open(edited)
    assert f"stepcell fuse --contract original.onnx {edited} -o repaired.onnx" in str(refused.value.hint)
    assert "--no-check" in str(refused.value.hint)
    with pytest.raises(ContractError, match="changed since export"):
        build_engine(edited, tmp_path / "x.engine")
    with StepLoop.open(edited, check_file=False) as loop:
        assert loop.step(x=np.zeros((1, 3, 32, 32), np.float16))["y"].shape == (1, 3, 32, 32)


def test_weights_in_another_file_belong_to_the_hash(denoiser_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "apart.onnx"
    onnx.save(onnx.load(denoiser_onnx), path, save_as_external_data=True, location="apart.bin", size_threshold=0)
    assert changes_since_export(read_onnx(path, check=False)) == []
    StepLoop.open(path).close()
    weights = tmp_path / "apart.bin"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ContractError, match="changed since export"):
        StepLoop.open(path)
    weights.unlink()
    with pytest.raises(InputError, match=r"apart\.bin"):
        StepLoop.open(path)


def test_every_flipped_bit_of_a_contract_is_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    """A flip may leave valid JSON with another shape, range or initial value, or rename the checksum itself."""
    found = onnx.load(denoiser_onnx)
    (entry,) = [entry for entry in found.metadata_props if entry.key == METADATA_KEY]
    text = entry.value
    assert len(json.loads(text)["checksum"]) == 64
    path = tmp_path / "flipped.onnx"
    whole = denoiser_onnx.read_bytes()
    start = whole.index(text.encode())
    random = np.random.default_rng(0)
    key = [text.index('"checksum"') + i for i in range(10)] + [text.index('"graph_sha256"') + i for i in range(14)]
    for position in [*key, *random.integers(0, len(text), 200)]:
        data = bytearray(whole)
        data[start + position] ^= 1 << random.integers(0, 7)
        path.write_bytes(data)
        with pytest.raises((ContractError, InputError)):
            read_onnx(path)


def test_contract_without_a_checksum_is_taken(denoiser_onnx: Path) -> None:
    """Written by hand or by another program."""
    contract = read_onnx(denoiser_onnx).contract
    assert contract.from_json(contract.to_json()) == contract
    assert base64.b16decode(str(contract.graph_sha256).upper())
