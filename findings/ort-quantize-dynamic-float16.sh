#!/usr/bin/env bash
# ONNX Runtime's quantize_dynamic takes a float16 model without complaint and writes one that nothing loads.
#
# Versions:  onnxruntime 1.31.1 and 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11.
# Input:     a Conv and a MatMul, each with float16 input and weights.
# Behaviour: it returns normally, with a file of DynamicQuantizeLinear, which the standard defines for float32 alone. The
#            checker of onnx refuses it once types are inferred, and ONNX Runtime does not load it.
# Seen:      "tensor(float16) of input parameter (x) of operator (DynamicQuantizeLinear) ... is invalid".
# Whom:      whoever quantises the float16 file that was made for a GPU: the tool says nothing, the device fails at start.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import logging

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.WARNING)
RNG = np.random.default_rng(0)
for op, size, x, y in (("Conv", (8, 4, 1, 1), "1, 4, 8, 8", "1, 8, 8, 8"), ("MatMul", (8, 8), "4, 8", "4, 8")):
    text = f'<ir_version: 9, opset_import: ["": 18]> g (float16[{x}] x) => (float16[{y}] y) {{ y = {op}(x, w) }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(RNG.standard_normal(size).astype(np.float16), "w"))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "half.onnx")
    onnxruntime.InferenceSession("half.onnx", providers=["CPUExecutionProvider"])
    quantize_dynamic("half.onnx", "int8.onnx")
    kinds = [node.op_type for node in onnx.load("int8.onnx").graph.node]
    try:
        onnxruntime.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])
        problem = ""
    except Exception as error:
        problem = str(error)
    print(f"onnxruntime {onnxruntime.__version__}: {op}: {kinds}: {problem[:140]}")
    assert "DynamicQuantizeLinear" in kinds, "changed: it quantises in another way"
    assert "float16" in problem, "changed: the file loads"
PY

for version in 1.31.1 1.32.0; do
    python3 -m venv "env-$version"
    "env-$version/bin/pip" install --quiet --disable-pip-version-check \
        "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
    "env-$version/bin/python" probe.py
done
echo "as described"
