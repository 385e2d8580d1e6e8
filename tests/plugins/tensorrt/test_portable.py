"""The portable form: its chain of nodes in the interpreter, its PTX through NVIDIA's assembler, and its operators
through the vendor's `tensorrt.plugin`, as far as the lean bindings include it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from stepcell.errors import BuildError
from stepcell.models.cells import conv_gru, conv_lstm
from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.signature import PARAMETERS, constants, kernel_inputs, kernel_outputs, kernels_of
from stepcell.plugins.kernels.tiles import Tile
from stepcell.plugins.onnx.chain import chained_model
from stepcell.plugins.onnx.rewrite import plugin_model
from stepcell.plugins.tensorrt import portable
from stepcell.plugins.tensorrt.portable import node_name, portable_ptx
from tests.fakes.interpreted_kernels import launch as run_interpreted

TILE = Tile(128, 32, 64, 1)
CELLS = {
    "gru_x3_h5_k3x3_soft_float32": ["narrow_state", "gru_gates", "gru_candidate"],
    "gru_x8_h12_k1x3_hard_float16": ["gru_gates", "gru_candidate"],
    "gru-after_x4_h8_k3x3_soft_float32": ["narrow_state", "gru_after"],
    "lstm_x3_h8_k3x3_soft_float32": ["narrow_state", "lstm_step"],
    "lstm-channel_x3_h9_k3x3_soft_float16": ["lstm_step_peephole"],
}
SIZE = (2, 5, 6)


def model_of(cell: CellConfig) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """A model of one cell with a node behind it, and its weights."""
    random, C = np.random.default_rng(0), cell.hidden
    gates, taps = cell.gate_count, cell.kernel[0] * cell.kernel[1]
    shapes = {"W_x": (gates * C, cell.inputs, *cell.kernel), "b": (gates * C,)}
    shapes["W_h"] = ((2 if cell.op == "ConvGRU" else 4) * C, C, *cell.kernel)
    if cell.op == "ConvGRU":
        shapes["W_n"] = (C, C, *cell.kernel)
    shapes |= {"after": {"b_hn": (C,)}, "channel": {"w_c": (3, C, 1, 1)}}.get(cell.variant, {})
    weights = {
        name: (random.standard_normal(shape) * 1.5 * (taps * cell.inputs) ** -0.5).astype(np.float16)
        for name, shape in shapes.items()
    }
    attributes: dict[str, Any] = {"pads": [cell.kernel[0] // 2, cell.kernel[1] // 2] * 2, "gates": cell.gates}
    if cell.op == "ConvGRU":
        attributes["reset"] = cell.variant
    states = ["h"] if cell.op == "ConvGRU" else ["h", "c"]
    inputs = ["x", *(f"in.{s}" for s in states), *weights]
    node = helper.make_node(
        cell.op, inputs, [*(f"out.{s}" for s in states), "y"], "cell", domain="stepcell", **attributes
    )
    kind = TensorProto.FLOAT if cell.state_dtype == "float32" else TensorProto.FLOAT16
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, cell.inputs, 5, 6])]
    infos += [helper.make_tensor_value_info(f"in.{s}", kind, [2, C, 5, 6]) for s in states]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT16, [2, C, 5, 6])]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node, helper.make_node("Identity", ["y"], ["z"])], "g", infos, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("stepcell", 1)])
    return model, {name: torch.from_numpy(array).double() for name, array in weights.items()}


def to_map(x: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(x.shape[0], *x.shape[2:], padded(x.shape[1]), dtype=torch.float16)
    result[..., : x.shape[1]] = x.permute(0, 2, 3, 1)
    return result


def run(model: onnx.ModelProto, cell: CellConfig, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every plugin node in order, each kernel given only what its node names."""
    batch, height, width = SIZE
    values = values | {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    maps = {"float16": (batch, height, width, padded(cell.hidden)), "float32": (batch, cell.hidden, height, width)}
    for node in model.graph.node:
        if node.domain != "stepcell":
            continue
        kernel = node.op_type.removesuffix("_peephole")
        given = dict(
            zip((p.name for p in kernel_inputs(kernel, cell)), (values[name] for name in node.input), strict=True)
        )
        for parameter, name in zip(kernel_outputs(kernel), node.output, strict=True):
            dtype = cell.state_dtype if parameter.dtype == "state" else "float16"
            given[parameter.name] = values[name] = torch.full(maps[dtype], float("nan"), dtype=getattr(torch, dtype))
        numbers = {"H": height, "W": width, "P": batch * height * width}
        arguments = [numbers.get(p.name, given.get(p.name, torch.zeros(8))) for p in PARAMETERS[kernel]]
        grid = (-(-numbers["P"] // TILE.pixels), -(-padded(cell.hidden) // TILE.channels))
        run_interpreted(kernel, grid, arguments, constants(kernel, cell, TILE))
    return values


@pytest.mark.parametrize("label", CELLS)
def test_the_chain_computes_the_cell(label: str) -> None:
    cell = CellConfig.from_label(label)
    model, weights = model_of(cell)
    plugin = plugin_model(model).model
    before = plugin.SerializeToString(deterministic=True)
    chain = chained_model(plugin)
    assert plugin.SerializeToString(deterministic=True) == before
    assert [node.op_type for node in chain.graph.node] == [*CELLS[label], "Identity"]
    onnx.checker.check_model(chain)

    batch, height, width = SIZE
    generator, wide = torch.Generator().manual_seed(0), cell.state_dtype == "float32"
    names = ["h"] if cell.op == "ConvGRU" else ["h", "c"]
    shape = (batch, cell.hidden, height, width)
    exact = {name: (torch.randn(shape, generator=generator) * 0.5).half().double() for name in names}
    states = {f"in.{n}": exact[n].float() if wide else to_map(exact[n].half()) for n in names}
    worst = 0.0
    for _ in range(4):
        x = torch.randn((batch, cell.inputs, height, width), generator=generator).half()
        got = run(chain, cell, {"x": to_map(x), **states})
        w = weights
        if cell.op == "ConvGRU":
            new = [conv_gru(x.double(), exact["h"], w["W_x"], w["b"], w["W_h"], w["W_n"], w.get("b_hn"), cell.gates)]
        else:
            new = list(conv_lstm(x.double(), *exact.values(), w["W_x"], w["b"], w["W_h"], w.get("w_c"), cell.gates))
        exact = dict(zip(names, new, strict=True))
        states = {f"in.{n}": got[f"out.{n}"] for n in names}
        for name in names:
            value = got[f"out.{name}"]
            value = value if wide else value[..., : cell.hidden].permute(0, 3, 1, 2)
            worst = max(worst, float((value.double() - exact[name]).abs().nan_to_num(nan=9.0).max()))
        y = got["y"][..., : cell.hidden].permute(0, 3, 1, 2)
        worst = max(worst, float((y.double() - exact["h"]).abs().nan_to_num(nan=9.0).max()))
    assert worst < (3e-3 if wide else 2e-2), f"worst difference over 4 steps {worst:.2e}"


def test_a_chain_of_two_cells_on_one_state_narrows_it_once() -> None:
    """The second cell reads y of the first as the fp16 mirror of its state."""
    cell, (batch, height, width) = CellConfig.from_label("gru_x3_h5_k3x3_soft_float32"), SIZE
    model, w = model_of(cell)
    first, copy = model.graph.node
    second = onnx.NodeProto()
    second.CopyFrom(first)
    second.name, second.input[1] = "second", "between"
    first.output[0], first.output[1] = "between", "inner"
    del model.graph.node[:]
    model.graph.node.extend([first, second, copy])
    model.graph.value_info.append(helper.make_tensor_value_info("between", TensorProto.FLOAT, [2, cell.hidden, 5, 6]))
    chain = chained_model(plugin_model(model).model)
    kernels = ["narrow_state", *["gru_gates", "gru_candidate"] * 2, "Identity"]
    assert [node.op_type for node in chain.graph.node] == kernels
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((batch, cell.hidden, height, width), generator=generator) * 0.5
    exact, worst = h.double(), 0.0
    for _ in range(3):
        x = torch.randn((batch, cell.inputs, height, width), generator=generator).half()
        h = run(chain, cell, {"x": to_map(x), "in.h": h})["out.h"]
        for _ in range(2):
            exact = conv_gru(x.double(), exact, w["W_x"], w["b"], w["W_h"], w["W_n"], None, cell.gates)
        worst = max(worst, float((h.double() - exact).abs().nan_to_num(nan=9.0).max()))
    assert worst < 3e-3, f"worst difference over 3 steps {worst:.2e}"


def test_no_tile_needs_what_tensorrt_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """No counters and no launch attribute; gates that differ in nothing else are compiled once."""
    monkeypatch.setattr(portable, "_fitting", lambda *arguments: arguments[2])
    cell = CellConfig.from_label("gru_x256_h256_k3x3_soft_float32")
    for kernel in ("gru_gates", "gru_candidate"):
        found: Any = portable.portable_kernels(kernel, cell, "9.0", 300)
        assert len(found) == len(set(found)) == 3
        assert not any(tile.overlap or tile.splits > 1 for tile in found)


def declaration(kernel: str, body: str = "") -> str:
    """PTX as Triton writes it, with as many parameters as the kernel has."""
    lines = [
        f"\t.param .u32 {kernel}_param_{i}"
        if p.dtype == "int32"
        else f"\t.param .u64 .ptr .global .align 1 {kernel}_param_{i}"
        for i, p in enumerate(PARAMETERS[kernel])
    ]
    lines += [f"\t.param .u64 .ptr .global .align 1 {kernel}_param_{len(lines) + i}" for i in range(2)]
    return f".version 8.7\n.visible .entry {kernel}(\n" + ",\n".join(lines) + "\n)\n.reqntid 128\n{\n" + body + "}\n"


@pytest.mark.parametrize("label", CELLS)
def test_parameters_stand_in_tensorrts_order(label: str) -> None:
    cell = CellConfig.from_label(label)
    for kernel in kernels_of(cell, fp16_mirror=False):
        ptx = portable_ptx(kernel, cell, declaration(kernel))
        numbers = [int(text) for text in re.findall(r"_param_(\d+)", ptx)]
        names = [PARAMETERS[kernel][number].name for number in numbers]
        count = len(kernel_inputs(kernel, cell))
        assert names[count : count + 3] == ["H", "W", "P"]
        assert all(name.endswith("_out") for name in names[count + 3 :])
        assert "pre" not in names
        assert ("peephole" in names) == (node_name(kernel, cell) == "lstm_step_peephole")
        assert ptx.count(",\n") == len(names) - 1


def test_ptx_that_cannot_be_used_is_refused() -> None:
    cell = CellConfig.from_label("gru_x3_h5_k3x3_soft_float32")
    with pytest.raises(BuildError, match=r"reads parameters that TensorRT does not pass: \[2\]"):
        portable_ptx("gru_gates", cell, declaration("gru_gates", "\tld.param.b64 %rd1, [gru_gates_param_2];\n"))
    for broken in ("", declaration("gru_gates").replace(".entry", ".func"), declaration("gru_candidate")):
        with pytest.raises(BuildError, match="does not have the expected form"):
            portable_ptx("gru_gates", cell, broken)


VENDOR = """
import json, sys
import numpy as np
import tensorrt_lean_bindings as trt
import tensorrt_rtx

# The lean bindings carry tensorrt.plugin, but not all that it imports.
class Number(int):
    def is_constant(self): return True
    def get_constant_value(self): return int(self)
class Builder:
    def constant(self, value): return Number(value)
    def operation(self, operation, a, b):
        return Number({"PROD": a * b, "CEIL_DIV": -(-a // b)}[operation.name])
trt.TensorFormat, trt.ITensor, trt.INetworkDefinition = (
    tensorrt_rtx.TensorFormat, tensorrt_rtx.ITensor, tensorrt_rtx.INetworkDefinition)
trt.IDimensionExpr = Number
sys.modules["tensorrt"] = trt

from stepcell.plugins.tensorrt import portable
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.signature import kernels_of

labels = sys.argv[1:]
found = {}
for label in labels:
    cell = CellConfig.from_label(label)
    for kernel in kernels_of(cell, fp16_mirror=False):
        found[kernel, label] = portable.portable_kernels(kernel, cell, "8.7")
portable.register_portable(trt, found)
portable.register_portable(trt, found)  # a second build in the same process

# Its tiles take 60 KB and more where they are not held to 48.
tight = portable.portable_kernels("gru_candidate", CellConfig.from_label("gru_x64_h64_k3x3_soft_float32"), "9.0")

portable.driver_ptx_version = lambda: 84  # of CUDA 12.4
(old,) = portable.portable_kernels("narrow_state", CellConfig.from_label(labels[0]), "8.7")

import tensorrt_lean_bindings.plugin as plugins
from tensorrt_lean_bindings.plugin import _lib as library, _tensor as tensors
tensors.SymIntExpr._exprBuilder = Builder()
result = {}
for (kernel, label), kernels in found.items():
    cell = CellConfig.from_label(label)
    name = portable.node_name(kernel, cell)
    creator = trt.get_plugin_registry().get_creator(name, "1", "stepcell")
    text = np.frombuffer(label.encode() + b"\\0", np.int8)
    fields = trt.PluginFieldCollection([trt.PluginField("cell", text, trt.PluginFieldType.CHAR)])
    ahead_of_time = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "stepcell", fields, trt.TensorRTPhase.BUILD, ahead_of_time)
    pointers = (*portable.kernel_inputs(kernel, cell), *portable.kernel_outputs(kernel))
    wanted = [portable.pointer_dtype(p, cell) for p in pointers]
    count = len(portable.kernel_inputs(kernel, cell))
    halves = {"float16": trt.DataType.HALF, "float32": trt.DataType.FLOAT}
    ranks = [1 if "." in p.buffer else 4 for p in portable.kernel_inputs(kernel, cell)]
    kept = tensors.SymIntExpr._exprBuilder
    types = plugin.get_output_data_types([halves[each] for each in wanted[:count]], ranks)
    inputs = []
    for rank, dtype in zip(ranks, wanted):
        sizes = (2, 8, 30, 40) if rank == 4 else (7,)
        shape = plugins.ShapeExprs.from_tuple(tuple(map(plugins.ShapeExpr, sizes)))
        inputs.append(plugins.TensorDesc(shape, halves[dtype]))
    definition = library.QDP_REGISTRY[f"stepcell::{name}"]
    (combination,) = definition.autotune_func(*inputs, label, ())
    entry, ptx, launch, numbers = definition.aot_impl_func(*inputs, label, (), 1)
    result[f"{kernel} {label}"] = {
        "types": [each.name for each in types], "wanted": wanted[count:],
        "formats": combination.layouts, "tactics": list(combination._tactics), "tiles": len(kernels),
        "grid": [int(launch.grid_x._expr), int(launch.grid_y._expr)],
        "block": int(launch.block_x._expr), "shared": int(launch.shared_mem._expr),
        "pixels": kernels[0].grid_pixels, "channels": kernels[0].grid_channels,
        "numbers": [int(each._expr) for each in numbers], "entry": entry, "ptx": ptx,
    }
print(json.dumps([result, [each.shared_bytes for each in tight], old.ptx]))
"""


@pytest.mark.slow
def test_through_the_vendors_decorators_and_assembler(tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_lean_bindings", exc_type=ImportError)
    import triton

    labels = ["gru_x3_h5_k3x3_soft_float32", "lstm-channel_x3_h9_k3x3_soft_float16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", VENDOR, *labels], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, tight, old = json.loads(done.stdout.splitlines()[-1])
    assert ".version 8.4\n" in old  # what that driver translates, and no newer
    assert ".version 8.4\n" not in found["narrow_state gru_x3_h5_k3x3_soft_float32"]["ptx"]
    assert len(tight) > 1
    assert max(tight) <= 48 * 1024
    assert len(found) == 4
    tools = next(iter(triton.__path__)) + "/backends/nvidia/bin/"
    for name, each in found.items():
        kernel, label = name.split()
        cell = CellConfig.from_label(label)
        count, outputs = len(kernel_inputs(kernel, cell)), len(kernel_outputs(kernel))
        assert each["types"] == [{"float16": "HALF", "float32": "FLOAT"}[dtype] for dtype in each["wanted"]], name
        parameters = (*kernel_inputs(kernel, cell), *kernel_outputs(kernel))
        halves = [p.dtype == "float16" or (p.dtype == "state" and cell.state_dtype == "float16") for p in parameters]
        maps = ["." not in p.buffer for p in parameters]
        assert each["formats"] == ["HWC8" if a and b else "LINEAR" for a, b in zip(halves, maps, strict=True)], name
        assert each["tactics"] == list(range(1, each["tiles"] + 1))
        assert each["numbers"] == [30, 40, 2 * 30 * 40]
        assert each["grid"] == [-(-2400 // each["pixels"]), each["channels"]]
        assert each["block"] == 128
        assert each["shared"] <= 48 * 1024
        source, code = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
        source.write_text(each["ptx"])
        subprocess.run([tools + "ptxas", "-arch=sm_87", source, "-o", code], check=True)
        text = subprocess.run(
            [tools + "cuobjdump", "--dump-elf", code], capture_output=True, text=True, check=True
        ).stdout
        info = re.findall(r"Ordinal\s*:\s*(0x\w+)\s+Offset\s*:\s*(0x\w+)\s+Size\s*:\s*(0x\w+)", text)
        sizes = [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, _, size in info)]
        assert sizes == [8] * count + [4] * 3 + [8] * outputs, name
        assert each["entry"] == kernel
