#!/usr/bin/env bash
# ONNX Runtime's highest optimisation level makes convolutions of few channels several times slower on a CPU.
#
# Versions:  onnxruntime 1.31.1 and 1.32.0, CPUExecutionProvider, Linux x86-64 with AVX-512; onnx 1.23.2, numpy 2.4.6.
# Input:     one convolution with a 1x1 kernel, from 3 to 3 channels, over a picture of 1920x1080: a matrix of colours.
# Behaviour: at ORT_ENABLE_ALL, which is the default, its constant weights are brought into a layout of blocks of 16
#            channels. The 13 that are missing are computed as zeros, and a ReorderOutput node drops them again. At
#            ORT_ENABLE_EXTENDED, or with the same weights as an input of the graph with a default value, which is not
#            constant, the convolution stays in the plain layout.
# Seen:      one thread, AMD EPYC (Zen 4): 15 to 20 ms by default, 2.6 ms at ORT_ENABLE_EXTENDED, 2.5 ms with the input.
# Whom:      whoever runs networks at the full size of a picture: conversions of colours and masks that were put into the
#            graph, last layers, cells of few channels. The level that should be fastest is the slow one, and a profile
#            shows the node by the name that it always had. With 32 channels on either side the blocks are the faster
#            layout, so lowering the level for a whole network costs more than it gains.
#
# Exit code 0: behaves as described. Anything else: it has changed, or the processor has no such layout.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SHAPE = (1, 3, 1080, 1920)
rng = np.random.default_rng(0)
weight = numpy_helper.from_array(rng.random((3, 3, 1, 1), np.float32), "w")
x, y = rng.random(SHAPE, np.float32), np.empty(SHAPE, np.float32)
tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"]
default = helper.make_tensor_value_info("w", TensorProto.FLOAT, (3, 3, 1, 1))


def session(level, inputs):
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", inputs, tensors[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level, options.optimized_model_filepath = level, "optimised.onnx"
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = made.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
    return made, binding, sorted(node.op_type for node in onnx.load("optimised.onnx").graph.node)


ALL, EXTENDED = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
cases = {
    "default level": session(ALL, tensors[:1]),
    "extended": session(EXTENDED, tensors[:1]),
    "default level, weights as an input": session(ALL, [*tensors[:1], default]),
}
times = {name: [] for name in cases}
for _ in range(15):
    for name, (made, binding, _) in cases.items():
        started = time.perf_counter()
        made.run_with_iobinding(binding)
        times[name].append(time.perf_counter() - started)
best = {name: min(each) for name, each in times.items()}
for name, (_, _, nodes) in cases.items():
    print(f"onnxruntime {ort.__version__}: {name}: {best[name] * 1e3:.1f} ms, nodes {', '.join(nodes)}")
assert cases["default level"][2] == ["Conv", "ReorderOutput"], "changed: no blocked layout"
assert all(nodes == ["Conv"] for _, _, nodes in list(cases.values())[1:]), "changed: blocks here too"
slow, *fast = best.values()
assert slow > 2 * max(fast), f"changed: {best}"
PY

for version in 1.31.1 1.32.0; do
    python3 -m venv "env-$version"
    "env-$version/bin/pip" install --quiet --disable-pip-version-check \
        "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
    "env-$version/bin/python" probe.py
done
echo "as described"
