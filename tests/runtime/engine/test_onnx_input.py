"""Graphs that must be refused before, or by, TensorRT's parser: always an error, never an abort."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from stepcell.errors import BuildError, ContractError, InputError, StepcellError
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions


def refusal(source: Path, folder: Path, change: Callable[[ModelProto], None]) -> StepcellError:
    """The error of building `source` after `change`; no file may be left behind."""
    model = onnx.load(source)
    change(model)
    broken = folder / "broken.onnx"
    broken.write_bytes(model.SerializeToString())
    with pytest.raises(StepcellError) as caught:
        build_engine(broken, folder / "broken.engine", check_file=False)
    assert sorted(path.name for path in folder.iterdir() if path.name != "weights.bin") == ["broken.onnx"]
    return caught.value


def first(model: ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def test_operator_with_no_definition_is_named(denoiser_onnx: Path, tmp_path: Path) -> None:
    def drop_functions(model: ModelProto) -> None:
        del model.functions[:]

    error = refusal(denoiser_onnx, tmp_path, drop_functions)
    assert isinstance(error, BuildError)
    assert "node 'cell/ConvGRU', operator stepcell::ConvGRU: it is no standard operator" in error.message


def test_operator_that_tensorrt_does_not_have_is_named(denoiser_onnx: Path, tmp_path: Path) -> None:
    def use_det(model: ModelProto) -> None:
        first(model, "Conv").op_type = "Det"

    error = refusal(denoiser_onnx, tmp_path, use_det)
    assert "operator Det: TensorRT does not support this operator" in error.message


def test_operator_inside_a_function_is_found(denoiser_onnx: Path, tmp_path: Path) -> None:
    def use_det(model: ModelProto) -> None:
        next(node for node in model.functions[0].node if node.op_type == "Sigmoid").op_type = "Det"

    error = refusal(denoiser_onnx, tmp_path, use_det)
    assert "node 'cell/ConvGRU' > number " in error.message
    assert "operator Det" in error.message


def test_operator_inside_a_branch_is_found(denoiser_onnx: Path, tmp_path: Path) -> None:
    def add_branch(model: ModelProto) -> None:
        branch = helper.make_graph([helper.make_node("Strange", [], ["b"], "deep", domain="other")], "branch", [], [])
        model.graph.node.append(
            helper.make_node("If", ["condition"], ["unused"], "choice", then_branch=branch, else_branch=branch)
        )
        model.graph.initializer.append(numpy_helper.from_array(np.ones((), bool), "condition"))

    assert "node 'choice' > 'deep', operator other::Strange" in refusal(denoiser_onnx, tmp_path, add_branch).message


def test_function_that_calls_itself_is_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    def recurse(model: ModelProto) -> None:
        call = model.functions[0].node.add()
        call.CopyFrom(first(model, "ConvGRU"))

    assert "calls itself" in refusal(denoiser_onnx, tmp_path, recurse).message


def test_two_overloads_of_a_function_are_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    def overload(model: ModelProto) -> None:
        model.functions.add().CopyFrom(model.functions[0])
        model.functions[1].overload = "second"

    assert "stepcell::ConvGRU is defined twice" in refusal(denoiser_onnx, tmp_path, overload).message


def test_parser_error_comes_out_with_node_and_operator(denoiser_onnx: Path, tmp_path: Path) -> None:
    def shrink_weights(model: ModelProto) -> None:
        name = first(model, "ConvGRU").input[4]
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :-1], name))

    error = refusal(denoiser_onnx, tmp_path, shrink_weights)
    assert isinstance(error, BuildError)
    assert "TensorRT-RTX refused the model: node cell/ConvGRU (ConvGRU)" in error.message
    assert "cudaError" not in error.message


def test_mixed_precision_without_a_cast_is_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    def widen(model: ModelProto) -> None:
        name = first(model, "Conv").input[1]
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))

    assert isinstance(refusal(denoiser_onnx, tmp_path, widen), BuildError)


def test_invalid_graph_is_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    def unplug(model: ModelProto) -> None:
        first(model, "Conv").input[0] = "nowhere"

    assert "is not a valid ONNX model" in refusal(denoiser_onnx, tmp_path, unplug).message


def test_weights_outside_the_file_are_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    def move_out(model: ModelProto) -> None:
        tensor = model.graph.initializer[0]
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")

    assert "stored outside the file" in refusal(denoiser_onnx, tmp_path, move_out).message


def test_model_without_a_contract_is_refused(denoiser_onnx: Path, tmp_path: Path) -> None:
    def forget(model: ModelProto) -> None:
        del model.metadata_props[:]

    error = refusal(denoiser_onnx, tmp_path, forget)
    assert isinstance(error, ContractError)
    assert "has no state contract" in error.message
    assert "stepcell export" in str(error.hint)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": "1.1"', '"schema": "2.0"', "schema 2.0 is not supported"),
        ('"name": "y"', '"name": "z"', "graph and contract differ in outputs"),
        ('"dtype": "float32"', '"dtype": "float16"', "state_in.h: float32 in TensorRT's network, float16"),
        ('"batch",\n    8,', '"batch",\n    9,', "state_in.h: shape"),
        ('"family"', "family", "malformed contract"),
    ],
)
def test_contract_that_does_not_fit_the_graph_is_refused(
    denoiser_onnx: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    def rewrite(model: ModelProto) -> None:
        text = model.metadata_props[0].value
        assert old in text
        model.metadata_props[0].value = text.replace(old, new)

    error = refusal(denoiser_onnx, tmp_path, rewrite)
    assert isinstance(error, ContractError)
    assert message in error.message


@pytest.mark.parametrize("content", [b"", b"not an ONNX model at all", b"\x08\x0a", None], ids=str)
def test_file_that_is_no_model_is_refused(denoiser_onnx: Path, tmp_path: Path, content: bytes | None) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(denoiser_onnx.read_bytes()[:3000] if content is None else content)
    with pytest.raises(InputError, match=r"broken\.onnx: is not an ONNX model"):
        build_engine(broken, tmp_path / "broken.engine")
    with pytest.raises(InputError, match="cannot be read"):
        build_engine(tmp_path / "missing.onnx", tmp_path / "broken.engine")
    with pytest.raises(InputError, match="cannot be read"):
        build_engine(tmp_path, tmp_path / "broken.engine")


@pytest.mark.parametrize("op", ["Conv", "Det"])
def test_no_garbage_is_collected_while_tensorrt_talks(
    op: str, denoiser_onnx: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """It logs while it holds a lock that a builder found by the collector would wait for: a build hung forever."""
    collecting: list[bool] = []

    def listen(record: logging.LogRecord) -> bool:
        if record.name.endswith("tensorrt_module"):
            collecting.append(gc.isenabled())
        return True

    logged.handler.addFilter(listen)
    model = onnx.load(denoiser_onnx)
    first(model, "Conv").op_type = op
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert gc.isenabled()
    with contextlib.nullcontext() if op == "Conv" else pytest.raises(BuildError):
        build_engine(path, tmp_path / "model.engine", options=BuildOptions(verbose=True), check_file=False)
    assert collecting or op == "Det"  # refused before there is much to say
    assert not any(collecting)
    assert gc.isenabled()
