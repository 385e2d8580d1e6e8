"""From an ONNX node to numbers: the model is rewritten, the plugin is created by TensorRT-RTX's registry, serialised
to a plan's fields and back, and stepped. Only the GPU is replaced: `tests.fakes.interpreted_driver`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
from onnx import TensorProto, helper, numpy_helper

from stepcell.contract import StateSpec
from stepcell.errors import PluginError
from stepcell.exporter.step_onnx.op_functions import function_for, variant_of
from stepcell.models.cells import conv_gru, conv_lstm
from stepcell.plugins.fp16_mirrors import Fp16Mirror, half_map
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.signature import kernels_of
from stepcell.plugins.kernels.tiles import Tile
from stepcell.plugins.onnx.chain import chained_model
from stepcell.plugins.onnx.rewrite import has_cells, plugin_model
from stepcell.plugins.tensorrt.fields import PLUGIN_VERSION
from stepcell.plugins.tensorrt.registry import kernels_offered, register
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of
from tests.fakes.interpreted_driver import TILES, InterpretedDriver, images_of, to_map

Array = np.ndarray[Any, Any]
H, C = (StateSpec(name=name, shape=("batch", 8, "height", "width")) for name in "hc")
CELLS = [
    "gru_x3_h5_k3x3_soft_float32",
    "gru_x8_h20_k1x5_hard_float16",
    "gru-after_x12_h8_k3x3_soft_float32",
    "lstm_x3_h5_k3x3_soft_float32",
    "lstm-channel_x4_h9_k5x1_hard_float32",
    "lstm-map_x3_h8_k3x3_soft_float16",
]


def weights_for(cell: CellConfig, size: tuple[int, int]) -> dict[str, Array]:
    """The op's weights in the order of its inputs, exact in float16."""
    random, C = np.random.default_rng(0), cell.hidden

    def conv(rows: int, inputs: int) -> Array:
        scale = 1.5 * (cell.kernel[0] * cell.kernel[1] * inputs) ** -0.5
        return (random.standard_normal((rows, inputs, *cell.kernel)) * scale).astype(np.float16)

    found = {"W_x": conv(cell.gate_count * C, cell.inputs)}
    found["b"] = (random.standard_normal(cell.gate_count * C) * 0.5).astype(np.float16)
    found["W_h"] = conv((2 if cell.op == "ConvGRU" else 4) * C, C)
    if cell.op == "ConvGRU":
        found["W_n"] = conv(C, C)
    extra = {"after": ("b_hn", (C,)), "channel": ("w_c", (3, C, 1, 1)), "map": ("w_c", (3, C, *size))}
    if cell.variant in extra:
        name, shape = extra[cell.variant]
        found[name] = (random.standard_normal(shape) * 0.5).astype(np.float16)
    return found


def cell_model(
    cell: CellConfig, size: tuple[int, int] = (7, 9), weights: dict[str, Array] | None = None
) -> onnx.ModelProto:
    """A model of one cell, as export writes it."""
    states = ["h"] if cell.op == "ConvGRU" else ["h", "c"]
    weights = weights or weights_for(cell, size)
    attributes: dict[str, Any] = {"pads": [cell.kernel[0] // 2, cell.kernel[1] // 2] * 2, "gates": cell.gates}
    if cell.op == "ConvGRU":
        attributes["reset"] = cell.variant
    inputs = ["x", *(f"state_in.{s}" for s in states), *(f"cell.{name}" for name in weights)]
    outputs = [*(f"state_out.{s}" for s in states), "y"]
    node = helper.make_node(cell.op, inputs, outputs, name="cell", domain="stepcell", **attributes)
    state = TensorProto.FLOAT if cell.state_dtype == "float32" else TensorProto.FLOAT16

    def info(name: str, dtype: int, channels: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, ["batch", channels, *size])

    graph = helper.make_graph(
        [node],
        "model",
        [info("x", TensorProto.FLOAT16, cell.inputs), *(info(f"state_in.{s}", state, cell.hidden) for s in states)],
        [*(info(f"state_out.{s}", state, cell.hidden) for s in states), info("y", TensorProto.FLOAT16, cell.hidden)],
        [numpy_helper.from_array(array, f"cell.{name}") for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("stepcell", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function_for(variant_of(node), 20)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("label", CELLS)
def test_a_node_becomes_the_plugins(label: str) -> None:
    cell = CellConfig.from_label(label)
    model = cell_model(cell)
    before = model.SerializeToString(deterministic=True)
    found = plugin_model(model)
    assert model.SerializeToString(deterministic=True) == before
    assert has_cells(model)
    assert found.cells == (("state_in.h", cell),)
    assert not found.fp16_mirrors
    assert not found.model.functions
    (node,) = found.model.graph.node
    assert {a.name: a.s.decode() for a in node.attribute} == {
        "cell": label,
        "plugin_namespace": "stepcell",
        "plugin_version": PLUGIN_VERSION,
    }
    packed = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer}
    assert len(node.input) == len(inputs_of(cell))
    for tensor, name in zip(inputs_of(cell), node.input, strict=True):
        if "." in tensor.buffer:
            assert packed[name].dtype == tensor.dtype, name
            assert packed[name].ndim == 1, name
    onnx.checker.check_model(found.model)


def port(graph: onnx.GraphProto, name: str) -> tuple[int, list[Any]]:
    """Element type and shape of an input or output of the graph."""
    kind = next(each for each in (*graph.input, *graph.output) if each.name == name).type.tensor_type
    return kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("label", CELLS)
def test_a_wide_state_brings_its_fp16_mirror(label: str) -> None:
    cell = CellConfig.from_label(label)
    found = plugin_model(cell_model(cell), [H, C])
    node, *others = found.model.graph.node
    onnx.checker.check_model(found.model)
    if cell.state_dtype == "float16":
        assert not found.fp16_mirrors
        assert "fp16_mirror" not in attributes_of(node)
        return
    assert found.fp16_mirrors == (Fp16Mirror("h", "half_in.h", "half_out.h"),)
    states = ["state_in.h"] if cell.op == "ConvGRU" else ["state_in.h", "state_in.c"]
    assert list(node.input)[: len(states) + 2] == ["x", *states, "half_in.h"]
    assert len(node.input) == len(inputs_of(cell, fp16_mirror=True))
    assert attributes_of(node)["fp16_mirror"] == 1
    for name in ("half_in.h", "half_out.h"):
        assert port(found.model.graph, name) == (TensorProto.FLOAT16, ["batch", cell.hidden, 7, 9])
    # The kernel writes the copy itself; y, an output of the model under its own name, is one of it.
    assert node.output[-1] == "half_out.h"
    assert [(each.op_type, *each.input, *each.output) for each in others] == [("Identity", "half_out.h", "y")]


def test_y_that_only_the_graph_reads_is_the_fp16_mirror_itself() -> None:
    model = cell_model(CellConfig.from_label(CELLS[0]))
    graph = model.graph
    graph.node[0].output[1] = "inner"
    graph.node.append(helper.make_node("Relu", ["inner"], ["y"]))
    branch = helper.make_graph(
        [helper.make_node("Neg", ["inner"], ["nested"])],
        "branch",
        [],
        [helper.make_tensor_value_info("nested", TensorProto.FLOAT16, None)],
    )
    graph.initializer.append(numpy_helper.from_array(np.bool_(1), "yes"))
    graph.node.append(helper.make_node("If", ["yes"], ["either"], then_branch=branch, else_branch=branch))
    found = plugin_model(model, [H])
    onnx.checker.check_model(found.model)
    node, relu, either = found.model.graph.node
    assert list(node.output) == ["state_out.h", "half_out.h"]
    assert list(relu.input) == ["half_out.h"]
    assert [list(a.g.node[0].input) for a in either.attribute] == [["half_out.h"]] * 2


def in_turn() -> onnx.ModelProto:
    """Two cells on one state, as RAFT's: the second's h is the first's h_next."""
    cell = CellConfig.from_label("gru_x5_h5_k1x5_soft_float32")
    model = cell_model(cell)
    node = model.graph.node[0]
    second = model.graph.node.add()
    second.CopyFrom(node)
    second.name, second.input[1] = "second", "between"
    node.output[0], node.output[1] = "between", "inner"
    return model


def test_a_state_of_another_cell_takes_that_cells_y() -> None:
    found = plugin_model(in_turn(), [H])
    onnx.checker.check_model(found.model)
    first, second, copy = found.model.graph.node
    assert list(first.input)[:3] == ["x", "state_in.h", "half_in.h"]
    assert list(second.input)[:3] == ["x", "between", "inner"]
    assert [*second.output] == ["state_out.h", "half_out.h"]
    assert [*copy.input, *copy.output] == ["half_out.h", "y"]
    # the portable form has no fp16 mirror from outside, and this one from inside
    portable = plugin_model(in_turn())
    assert not portable.fp16_mirrors
    assert [attributes_of(each).get("fp16_mirror") for each in portable.model.graph.node] == [None, 1]
    kernels = [node.op_type for node in chained_model(portable.model).graph.node]
    assert kernels == ["narrow_state", "gru_gates", "gru_candidate", "gru_gates", "gru_candidate"]


def _computed_state(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["state_in.h"], ["positive"]))
    model.graph.node[1].input[1] = "positive"


def _changed_after(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = "raw"
    model.graph.node.append(helper.make_node("Relu", ["raw"], ["state_out.h"]))


def _no_y(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[1] = ""
    model.graph.node.append(helper.make_node("Cast", ["state_out.h"], ["y"], to=TensorProto.FLOAT16))


@pytest.mark.parametrize("change", [_computed_state, _changed_after, _no_y])
def test_states_that_have_no_fp16_mirror(change: Callable[[onnx.ModelProto], None]) -> None:
    model = cell_model(CellConfig.from_label(CELLS[0]))
    change(model)
    found = plugin_model(model, [H])
    assert not found.fp16_mirrors
    assert not [node for node in found.model.graph.node if "fp16_mirror" in attributes_of(node)]


def test_a_state_whose_streams_are_no_batch_has_no_fp16_mirror() -> None:
    other = msgspec.structs.replace(H, batch_axis=2)
    assert not plugin_model(cell_model(CellConfig.from_label(CELLS[0])), [other]).fp16_mirrors


def test_only_what_the_nodes_replaced_is_dropped() -> None:
    model = cell_model(CellConfig.from_label(CELLS[0]))
    model.graph.node.append(helper.make_node("Identity", ["cell.W_n"], ["copy"]))
    other = helper.make_function("local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [])
    model.functions.append(other)
    found = plugin_model(model).model
    assert [function.name for function in found.functions] == ["Twice"]
    names = {tensor.name for tensor in found.graph.initializer}
    assert "cell.W_n" in names
    assert not names & {"cell.W_x", "cell.W_h", "cell.b"}


def test_types_of_states_are_inferred_where_the_file_does_not_say_them() -> None:
    model = cell_model(CellConfig.from_label(CELLS[0]))
    model.graph.node.insert(0, helper.make_node("Cast", ["state_in.h"], ["narrow"], to=TensorProto.FLOAT16))
    model.graph.node[1].input[1] = "narrow"
    ((state, cell),) = plugin_model(model).cells
    assert (state, cell.state_dtype) == ("narrow", "float16")


def _wide(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _computed(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Identity", ["cell.W_n"], ["other"]))
    model.graph.node[1].input[5] = "other"


def _integer_state(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT32


def _attribute(model: onnx.ModelProto, name: str) -> onnx.AttributeProto:
    return next(each for each in model.graph.node[0].attribute if each.name == name)


def _pads(model: onnx.ModelProto) -> None:
    _attribute(model, "pads").ints[0] = 0


def _no_gates(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.remove(_attribute(model, "gates"))


def _even(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array[:, :, :2]), tensor.name))


def _reset(model: onnx.ModelProto) -> None:
    _attribute(model, "reset").s = b"between"


def _nested(model: onnx.ModelProto) -> None:
    wrapper = model.functions.add()
    wrapper.domain, wrapper.name = "local", "Wrapped"
    wrapper.node.append(model.graph.node[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wide, "cell 'cell': computes in float32, the plugin in float16"),
        (_computed, "weight 'other' is computed in the graph"),
        (_integer_state, "states must be all float32 or all float16"),
        (_pads, r"pads must be \[1, 1, 1, 1\] for a 3x3 kernel, got \[0, 1, 1, 1\]"),
        (_no_gates, "has no attribute 'gates'"),
        (_even, "odd sizes, got 2x3"),
        (_reset, "has no variant 'between'"),
        (_nested, "inside a function or a subgraph"),
    ],
)
def test_refused(change: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = cell_model(CellConfig.from_label(CELLS[0]))
    change(model)
    with pytest.raises(PluginError, match=message):
        plugin_model(model)


PARSE = """
import sys, onnx, tensorrt_rtx as trt
from pathlib import Path
from stepcell.plugins.tensorrt import registry
registry.register(trt)
creators = registry._creators["tensorrt_rtx"]
original = type(creators[0])._offered
def offered(self, name, found):
    print("node", name, {key: value for key, value in found.items() if key != "cell"}, flush=True)
    cell, kernels = original(self, name, found)
    print("cell", cell.label, flush=True)
    return cell, kernels
type(creators[0])._offered = offered
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
with registry.kernels_offered({sys.argv[2]: ()}):
    trt.OnnxParser(network, logger).parse(Path(sys.argv[1]).read_bytes())
"""


@pytest.mark.parametrize("by_attributes", [True, False])
def test_a_real_parser_finds_the_plugin(tmp_path: Path, by_attributes: bool) -> None:
    """TensorRT-RTX's parser asks our creator, with fields that it made, and then ends the process: it can
    make a plugin but not host it. So this runs in a separate process, and checks how far it gets."""
    cell = CellConfig.from_label(CELLS[3])
    model = plugin_model(cell_model(cell), [H]).model
    node = model.graph.node[0]
    if by_attributes:  # as before TensorRT 10.10, where the domain was not looked at
        node.domain = ""
    else:
        kept = [a for a in node.attribute if a.name != "plugin_namespace"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    command = [sys.executable, "-c", PARSE, tmp_path / "model.onnx", cell.label]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = ["node cell {'fp16_mirror': b'\\x01\\x00\\x00\\x00'}", f"cell {cell.label}"]
    assert run.stdout.splitlines() == found, (run.stdout, run.stderr[-2000:])


def exact_step(
    cell: CellConfig, w: dict[str, torch.Tensor], x: torch.Tensor, states: list[torch.Tensor]
) -> list[torch.Tensor]:
    if cell.op == "ConvGRU":
        return [conv_gru(x, states[0], w["W_x"], w["b"], w["W_h"], w["W_n"], w.get("b_hn"), cell.gates)]
    return list(conv_lstm(x, *states, w["W_x"], w["b"], w["W_h"], w.get("w_c"), cell.gates))


RUNS = [(label, tile, False) for label in CELLS for tile in TILES[1:]]
RUNS += [(label, TILES[1], True) for label in CELLS if label.endswith("float32")]


@pytest.mark.parametrize(("label", "tile", "given"), RUNS, ids=lambda value: getattr(value, "label", str(value)))
def test_steps_of_the_plugin_equal_the_reference(
    label: str, tile: Tile, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`given`: y of a step is the fp16 mirror of the next."""
    cell, (batch, height, width) = CellConfig.from_label(label), (2, 7, 9)
    weights = weights_for(cell, (height, width))
    model = plugin_model(cell_model(cell, (height, width), weights), [H] if given else []).model
    packed = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    driver = InterpretedDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

    register(trt)
    creator: Any = trt.get_plugin_registry().get_creator(cell.op, PLUGIN_VERSION, "stepcell")
    text = np.frombuffer(_attribute(model, "cell").s + b"\0", np.int8)
    fields = [trt.PluginField("cell", text, trt.PluginFieldType.CHAR)]
    if given:
        fields.append(trt.PluginField("fp16_mirror", np.ones(1, np.int32), trt.PluginFieldType.INT32))
    attributes = trt.PluginFieldCollection(fields)
    with kernels_offered({label: images_of(cell)}):
        built = creator.create_plugin("cell", attributes, trt.TensorRTPhase.BUILD)
    loaded = creator.create_plugin("cell", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    plugin = loaded.attach_to_context(None)

    nodes, states = model.graph.node[0], 1 if cell.op == "ConvGRU" else 2
    descriptions = []
    inputs = inputs_of(cell, fp16_mirror=given)
    for tensor in (*inputs, *outputs_of(cell)):
        desc = trt.PluginTensorDesc()
        channels = cell.inputs if tensor.buffer == "x" else cell.hidden
        desc.dims = trt.Dims([1] if "." in tensor.buffer else [batch, channels, height, width])
        descriptions.append(desc)
    described = descriptions[: len(inputs)], descriptions[len(inputs) :]
    plugin.on_shape_change(*described)
    expected = [f"{k} {(tile if k != 'narrow_state' else TILES[1]).label}" for k in kernels_of(cell, fp16_mirror=given)]
    tactics = [[f"{image.info.kernel} {image.info.tile}" for image in images] for images in plugin.tactics]
    plugin.set_tactic(1 + tactics.index(expected))  # after the sizes: the first tactic's code goes

    pixels, wide = batch * height * width, cell.state_dtype == "float32"
    state_bytes = pixels * (cell.hidden * 4 if wide else padded(cell.hidden) * 2)
    x = driver.buffer(pixels * padded(cell.inputs) * 2)
    copy, y = (driver.buffer(pixels * padded(cell.hidden) * 2) for _ in range(2))
    old, new = ([driver.buffer(state_bytes) for _ in range(states)] for _ in range(2))
    constants_ = []
    for name in nodes.input[1 + states + given :]:
        constants_.append(driver.buffer(packed[name].nbytes))
        constants_[-1][:] = torch.from_numpy(packed[name].view(np.uint8).copy())
    bounds = trt.DynamicPluginTensorDesc()
    bounds.max = trt.Dims([batch, cell.hidden, height, width])
    scratch = driver.buffer(max(1, built.get_workspace_size([bounds, bounds], [])))

    generator = torch.Generator().manual_seed(1)
    shape = (batch, cell.hidden, height, width)
    exact = [(torch.randn(shape, generator=generator) * 0.5).half().double() for _ in range(states)]
    for buffer, value in zip(old, exact, strict=True):
        whole = value.float().contiguous() if wide else to_map(value.half())
        buffer[:] = whole.view(torch.uint8).flatten()
    copy[:] = torch.from_numpy(half_map(exact[0].float().numpy())).view(torch.uint8).flatten()
    w = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    worst = 0.0
    for step in range(16):
        if step == 8:  # a clone goes on with the same tactic, and loads the code itself
            plugin, old_plugin = plugin.clone(), plugin
            old_plugin.destroy()
        frame = torch.randn((batch, cell.inputs, height, width), generator=generator).half()
        x[:] = to_map(frame).view(torch.uint8).flatten()
        for buffer in (y, scratch, *new):
            buffer.fill_(255)  # NaN: what is not written, or read before it is, shows
        read = (x, *old, *([copy] if given else []), *constants_)
        addresses = [[b.data_ptr() for b in buffers] for buffers in (read, (*new, y))]
        plugin.enqueue(*described, *addresses, scratch.data_ptr(), 77)
        exact = exact_step(cell, w, frame.double(), exact)
        for buffer, wanted in zip((*new, y), (*exact, exact[0]), strict=True):
            if wide and buffer is not y:
                got = buffer.view(torch.float32).view(shape)
            else:
                got = buffer.view(torch.float16).view(batch, height, width, -1)[..., : cell.hidden].permute(0, 3, 1, 2)
            difference = float((got.double() - wanted).abs().max())
            worst = max(worst, difference) if difference == difference else float("inf")
        old, new, copy, y = new, old, y, copy
    tolerance = 3e-3 if wide else 2e-2  # as in tools/kernel_steps.py
    assert worst < tolerance, f"worst difference over 16 steps {worst:.2e}, allowed {tolerance:.0e}"
    assert driver.launches == expected * 16
    split_kernels = sum(name.endswith(TILES[2].label) for name in expected)
    assert len(driver.counters) == split_kernels
    assert not any(each.any() for each in driver.counters.values())
    other = loaded.attach_to_context(None)  # another context of the plan counts for itself
    other.set_tactic(plugin.tactic)
    other.on_shape_change(*described)
    assert len(driver.counters) == 2 * split_kernels
    other.destroy()
    plugin.destroy()
    assert set(driver.loaded) == {"unloaded"}
    assert not driver.counters
