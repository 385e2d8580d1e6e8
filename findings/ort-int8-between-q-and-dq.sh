#!/usr/bin/env bash
# ONNX Runtime makes no int8 convolution where an integer node stands between QuantizeLinear and DequantizeLinear.
#
# Versions:  onnxruntime 1.31.1 and 1.32.0, CPUExecutionProvider, Linux x86-64; onnx 1.23.2, numpy 2.4.6, Python 3.11.
# Input:     two tensors, joined and convolved, with int8 weights, inputs and output. Once joined as floats and then
#            quantised; once quantised and joined as int8, which is the same numbers and reads a quarter of the bytes; and
#            once with a Relu on the int8 tensor, which the standard allows since opset 14.
# Behaviour: only DequantizeLinear(QuantizeLinear(x)) is recognised. With a Concat or a Relu in between, the same
#            convolution stays a float32 Conv between conversions, without a message.
# Seen:      floats: QLinearConv; Concat of int8: Conv; Relu of int8: Conv.
# Whom:      whoever writes or edits quantised graphs: joining in int8 looks like the cheaper form, and is what TensorRT
#            does by itself. Recurrent cells join x and h before every convolution.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
CONSTANTS = {
    "s": np.float32(0.02), "z": np.int8(0), "out": np.float32(0.05),
    "w": RNG.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
    "ws": np.full(8, 0.001, np.float32), "wz": np.zeros(8, np.int8),
}
JOINED = {
    "floats": ["Concat a b > x", "QuantizeLinear x s z > q"],
    "Concat of int8": ["QuantizeLinear a s z > qa", "QuantizeLinear b s z > qb", "Concat qa qb > q"],
    "Relu of int8": ["Concat a b > x", "QuantizeLinear x s z > qx", "Relu qx > q"],
}
REST = ["DequantizeLinear q s z > d", "DequantizeLinear w ws wz > wd", "Conv d wd > c", "QuantizeLinear c out z > qc",
        "DequantizeLinear qc out z > y"]
ATTRIBUTES = {"Concat": {"axis": 1}, "Conv": {"pads": [1, 1, 1, 1]}}


def node(line):
    left, _, output = line.partition(" > ")
    op, *inputs = left.split()
    axis = {"axis": 0} if inputs[0] == "w" else {}
    return helper.make_node(op, inputs, [output], **ATTRIBUTES.get(op, {}), **axis)


def tensor(name, channels):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 32, 32])


feeds = {name: RNG.random((1, 4, 32, 32), np.float32) for name in "ab"}
found = {}
for label, lines in JOINED.items():
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items()]
    nodes = [node(line) for line in lines + REST]
    graph = helper.make_graph(nodes, "joined", [tensor("a", 4), tensor("b", 4)], [tensor("y", 8)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = "optimised.onnx"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, feeds)
    kinds = {each.op_type for each in onnx.load("optimised.onnx").graph.node}
    found[label] = kinds & {"Conv", "QLinearConv"}
    print(f"onnxruntime {onnxruntime.__version__}: {label}: {', '.join(found[label])}, sum of y {y.sum():.2f}")

expected = {"floats": {"QLinearConv"}, "Concat of int8": {"Conv"}, "Relu of int8": {"Conv"}}
assert found == expected, f"changed: {found}"
PY

for version in 1.31.1 1.32.0; do
    python3 -m venv "env-$version"
    "env-$version/bin/pip" install --quiet --disable-pip-version-check \
        "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
    "env-$version/bin/python" probe.py
done
echo "as described"
