"""The op functions stay well fused: kernels counted in real TensorRT-RTX engines, built with no GPU."""

from __future__ import annotations

import re
from typing import Any

import onnx
import pytest
import tensorrt_rtx as trt

from stepcell.exporter.step_onnx.contract import contract_for
from stepcell.exporter.step_onnx.graph import attach_functions, tidy
from stepcell.exporter.step_onnx.op_functions import Variant, function_for
from stepcell.exporter.step_onnx.trace import onnx_from_module
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.runtime.engine.tensorrt_module import no_collection


class Logger(trt.ILogger):
    """Keeps the verbose log, where TensorRT-RTX lists the kernels of an engine."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        self.lines.append(msg)


@no_collection()
def compute_kernels(model: onnx.ModelProto) -> list[str]:
    """Kernels of one step on compute capability 8.9, half activations as NHWC (HWC8).

    Signals and waits between streams are not kernels.
    """
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in tensors + [network.get_output(i) for i in range(network.num_outputs)]:
        if tensor.dtype == trt.DataType.HALF:
            tensor.allowed_formats = 1 << int(trt.TensorFormat.HWC8)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(network, config) is not None
    listing = next(line for line in logger.lines if line.startswith("Layers:"))
    layers = re.findall(r"Name: (\S+), LayerType: (\w+), Inputs", listing)
    return [name for name, kind in layers if kind not in ("signal", "wait")]


def traced_cell(cell: ConvGRUCell | ConvLSTMCell) -> onnx.ModelProto:
    """The graph as `export` writes it; its numbers are checked elsewhere."""
    stack = CellStack([cell]).eval()
    shapes = {"x": (1, cell.input_size, 64, 64)}
    contract = contract_for(stack, precision="float16", state_dtype="float32", shapes=shapes, dynamic=())
    model = onnx_from_module(stack.half(), contract, 20)
    tidy(model, contract)
    attach_functions(model, contract)
    return model


@pytest.mark.parametrize(
    ("cell", "kernels"),
    [
        (lambda: ConvGRUCell(32, 64, 3), 5),
        (lambda: ConvGRUCell(16, 16, 3), 5),
        (lambda: ConvGRUCell(32, 64, 3, reset="after"), 4),
        (lambda: ConvLSTMCell(32, 64, 3), 3),
    ],
    ids=["gru", "gru-16", "gru-after", "lstm"],
)
def test_kernels_per_step(cell: Any, kernels: int) -> None:
    found = compute_kernels(traced_cell(cell()))
    print(len(found), found)
    assert len(found) <= kernels


def test_the_count_sees_a_worse_form() -> None:
    """The gates' sigmoid before the split costs a kernel, so a regression of this kind is seen."""
    model = traced_cell(ConvGRUCell(32, 64, 3))
    function = function_for(Variant("ConvGRU"), 20)
    split = next(node for node in function.node if node.op_type == "Split")
    split.output[:] = ["z", "r"]
    split.input[0] = "s"
    kept = [node for node in function.node if node.output[0] not in ("a_z_wide", "a_r_wide", "z", "r") or node is split]
    at = next(i for i, node in enumerate(kept) if node.op_type == "Split")
    kept.insert(at, onnx.helper.make_node("Cast", ["a_g"], ["a_g_wide"], to=onnx.TensorProto.FLOAT))
    kept.insert(at + 1, onnx.helper.make_node("Sigmoid", ["a_g_wide"], ["s"]))
    del function.node[:]
    function.node.extend(kept)
    del model.functions[:]
    model.functions.append(function)
    assert len(compute_kernels(model)) > 5
