"""Files that other tools changed: `fuse --contract` brings the contract back, and `fuse` alone sees what it can.

The edits are what the tools do (docs/interop.md), made here with onnx alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.compose
import pytest
from onnx import ModelProto, TensorProto, helper, inliner, numpy_helper

from stepcell import StepLoop, fuse
from stepcell.contract import InitialValue, StepContract
from stepcell.dims import resolve
from stepcell.errors import ExportError, ParityError, UsageError
from stepcell.exporter.step_onnx.graph import embed_contract, set_shape
from stepcell.onnx_model import contract_text, read_onnx


@pytest.fixture(scope="module")
def original(denoiser_onnx_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's denoiser with a learned first value of its state."""
    model = onnx.load(denoiser_onnx_float32)
    contract = read_onnx(denoiser_onnx_float32).contract
    first = InitialValue.of(np.linspace(-0.5, 0.5, contract.states[0].shape[1], dtype=np.float32)[:, None, None])  # type: ignore[arg-type]
    state = msgspec.structs.replace(contract.states[0], init=first)
    embed_contract(model, msgspec.structs.replace(contract, states=(state,)))
    path = tmp_path_factory.mktemp("restore") / "original.onnx"
    onnx.save(model, path)
    return path


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "edited.onnx"
    onnx.save(model, path)
    return path


def without_contract(model: ModelProto) -> ModelProto:
    del model.metadata_props[:]
    return model


def prefixed(model: ModelProto) -> ModelProto:
    return onnx.compose.add_prefix(model, "net/")


def without_dots(model: ModelProto) -> ModelProto:
    """Names of letters, digits and underscores."""
    names = {port.name: port.name.replace(".", "_") for port in (*model.graph.input, *model.graph.output)}
    for port in (*model.graph.input, *model.graph.output):
        port.name = names[port.name]
    for node in model.graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
    return model


def in_opset_22(model: ModelProto) -> ModelProto:
    """The converter drops the functions and keeps node and metadata."""
    converted = onnx.version_converter.convert_version(model, 22)
    assert not converted.functions
    return converted


def unsorted_and_bare(model: ModelProto) -> ModelProto:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return without_contract(model)


def read_contract(model: ModelProto) -> StepContract:
    return StepContract.from_json(contract_text(model) or "")


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: without_contract(inliner.inline_local_functions(model)),
        lambda model: unsorted_and_bare(prefixed(model)),
        lambda model: in_opset_22(without_dots(model)),
    ],
    ids=["inlined", "prefixed, unsorted", "without dots, opset 22"],
)
def test_everything_comes_back(edit: Callable[[ModelProto], ModelProto], original: Path, tmp_path: Path) -> None:
    edited = saved(edit(onnx.load(original)), tmp_path)
    repaired = tmp_path / "repaired.onnx"
    fuse(edited, repaired, contract=original)
    before, after = read_onnx(original).contract, read_onnx(repaired).contract  # which also compares the hash
    assert after.inputs == before.inputs
    assert after.outputs == before.outputs
    assert after.states == before.states
    assert after.cells == before.cells
    assert after.parity == before.parity
    assert {**after.source, **before.source, "opset": after.source["opset"]} == after.source
    frames = np.random.default_rng(0).random((5, 1, 3, 24, 32), np.float32)
    with StepLoop.open(original) as one, StepLoop.open(repaired) as other:
        for frame in frames:
            np.testing.assert_allclose(other.step(x=frame)["y"], one.step(x=frame)["y"], atol=1e-6)


def fixed_and_cut(model: ModelProto) -> ModelProto:
    """Sizes are numbers, and the values of another layer are an output."""
    sizes = {"batch": 2, "height": 32, "width": 48}
    contract = read_contract(model)
    for port in (*model.graph.input, *model.graph.output):
        set_shape(port, resolve({**contract.graph_inputs, **contract.graph_outputs}[port.name].shape, sizes))
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8, 16, 24]))
    return model


def test_fixed_sizes_and_new_outputs_are_said(original: Path, tmp_path: Path) -> None:
    edited = saved(fixed_and_cut(onnx.load(original)), tmp_path)
    report = fuse(edited, tmp_path / "repaired.onnx", contract=original)
    assert {"batch is fixed at 2", "height is fixed at 32", "width is fixed at 48"} <= set(report.notes)
    assert report.contract.inputs[0].shape == (2, 3, 32, 48)
    assert report.contract.states[0].shape == (2, 8, 16, 24)
    assert len(report.contract.outputs) == 2
    assert report.contract.inputs[0].range == (0.0, 1.0)


def quantised(model: ModelProto) -> ModelProto:
    """Weights of the first convolution are rounded to 7 bits."""
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == conv.input[1])
    values = numpy_helper.to_array(weights)
    step = np.abs(values).max() / 63
    weights.CopyFrom(numpy_helper.from_array((np.round(values / step) * step).astype(np.float32), weights.name))
    return model


def test_another_result_is_refused_unless_it_is_allowed(original: Path, tmp_path: Path) -> None:
    edited = saved(quantised(onnx.load(original)), tmp_path)
    repaired = tmp_path / "repaired.onnx"
    with pytest.raises(ParityError, match="differs from the original file") as refused:
        fuse(edited, repaired, contract=original)
    assert "--tolerance" in str(refused.value.hint)
    assert not repaired.exists()
    parity = fuse(edited, repaired, contract=original, tolerance=0.3).contract.parity
    assert parity is not None
    assert parity.reference == "the original file"
    assert parity.max_abs_error["y"] > 1e-4


def test_another_model_is_refused(original: Path, stack_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not the original with changes"):
        fuse(saved(onnx.load(stack_onnx), tmp_path), tmp_path / "repaired.onnx", contract=original)


def test_arguments_that_the_contract_answers_are_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --state, --stateless, --shape"):
        fuse(original, tmp_path / "x.onnx", contract=original, states={"h": "h"})
    with pytest.raises(UsageError, match="also used as --contract"):
        fuse(original, original, contract=original)


def test_without_the_original_cells_and_names_are_found(original: Path, tmp_path: Path) -> None:
    report = fuse(saved(without_contract(onnx.load(original)), tmp_path), tmp_path / "again.onnx")
    assert [cell.op for cell in report.contract.cells] == ["stepcell::ConvGRU"]
    assert [state.name for state in report.contract.states] == ["h"]
    assert report.contract.parity is not None
    assert max(report.contract.parity.max_abs_error.values()) < 1e-5


def test_inlined_cells_of_every_variant_are_found(stack_onnx: Path, tmp_path: Path) -> None:
    model = without_contract(inliner.inline_local_functions(onnx.load(stack_onnx)))
    report = fuse(saved(model, tmp_path), tmp_path / "again.onnx")
    assert [cell.op for cell in report.contract.cells] == ["stepcell::ConvGRU", "stepcell::ConvLSTM"]
    assert [state.name for state in report.contract.states] == ["h0", "h1", "c1"]


def test_size_of_a_state_is_taken_from_its_output(tmp_path: Path) -> None:
    """Shape inference stops at an operator of another domain, and the file says what it would find."""
    rounded = ["batch", 2, "(height + 1) // 2", "(width + 1) // 2"]
    weights = {"w": np.full((2, 3, 3, 3), 0.05, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["d"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Gelu", ["d"], ["e"], domain="com.microsoft"),
        helper.make_node("Add", ["e", "state"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["next_state"]),
        helper.make_node("Identity", ["next_state"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 2, "state_height", "state_width"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, rounded) for name in ("y", "next_state")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = saved(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path)
    (state,) = fuse(path, tmp_path / "fused.onnx").contract.states
    assert state.shape == ("batch", 2, "(height + 1) // 2", "(width + 1) // 2")
