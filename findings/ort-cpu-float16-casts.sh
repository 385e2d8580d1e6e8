#!/usr/bin/env bash
# ONNX Runtime on a CPU drops a cast to float16 that stands before a float16 operator, at every optimisation level.
#
# Versions:  onnxruntime 1.31.1 and 1.32.0 (the newest when this was written), CPUExecutionProvider, Linux x86-64;
#            onnx 1.23.2, numpy 2.4.6, Python 3.11 to 3.13.
# Input:     float32 -> Cast to float16 -> an operator in float16 -> Cast to float32.
# Behaviour: the operator has no float16 kernel on a CPU, so ONNX Runtime runs its float32 kernel between casts of its
#            own. It then removes these together with the casts that the model's author wrote, although the first of them
#            rounds: 1e-12 and 123456.7, which float16 takes for 0 and infinity, come out of Neg and Relu as they went
#            in. ORT_DISABLE_ALL changes nothing, and the saved optimised model shows no cast before the operator.
#            A bare pair of casts (float32 -> float16 -> float32) does round, since 1.17 (microsoft/onnxruntime 8787 and
#            17953), so a test of that pair, or of a model whose inputs are float16, says that all is well.
#            Written twice (to float16, to float32, to float16) the cast is kept.
# Seen:      Neg: -1e-12 and -123456.7 where the standard says -0 and -inf.
#            h <- h + 0.001 (1 - h) cast to float16, from a float32 state: 0.99995 after 10000 steps; by the standard
#            (onnx.reference) it stalls at 0.7559.
# Whom:      everyone who checks a float16 model on a CPU before it goes to a GPU: overflow, underflow and states that
#            stall do not show there, and errors look smaller than they will be.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx.reference import ReferenceEvaluator

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
X = np.array([1e-12, 123456.7], np.float32)  # in float16: 0 and infinity


def graph(nodes):
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g (float[N] x) => (float[N] y) {{{nodes}}}')


def session(model, level):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = "optimised.onnx"
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def both(nodes, level):
    model = graph(nodes)
    (ours,) = session(model, level).run(["y"], {"x": X})
    with np.errstate(over="ignore"):
        (standard,) = ReferenceEvaluator(model).run(["y"], {"x": X})
    return ours, standard, [node.op_type for node in onnx.load("optimised.onnx").graph.node]


def free_run(step, steps=10000):
    h = np.zeros(1, np.float32)
    for _ in range(steps):
        (h,) = step(["y"], {"x": h})
    return float(h[0])


PAIR = "h = Cast<to = 10>(x) y = Cast<to = 1>(h)"
ONE = "h = Cast<to = 10>(x) k = {}(h) y = Cast<to = 1>(k)"
TWICE = "a = Cast<to = 10>(x) b = Cast<to = 1>(a) h = Cast<to = 10>(b) k = {}(h) y = Cast<to = 1>(k)"
MEMORY = """
one_32 = Constant<value = float[1] {1.0}>() one = Cast<to = 10>(one_32)
rate_32 = Constant<value = float[1] {0.001}>() rate = Cast<to = 10>(rate_32)
h = Cast<to = 10>(x) rest = Sub(one, h) change = Mul(rate, rest) new = Add(h, change) y = Cast<to = 1>(new)
"""

print("onnxruntime", onnxruntime.__version__)
for level in LEVELS:
    ours, standard, _ = both(PAIR, level)
    assert np.array_equal(ours, standard), "changed: a pair of casts does not round"
    for operator in ("Neg", "Relu"):
        ours, standard, nodes = both(ONE.format(operator), level)
        print(f"{level}: {operator} gives {ours}, by the standard {standard}; ran {nodes}")
        assert not np.array_equal(ours, standard), "changed: the cast before a float16 operator rounds"
        assert nodes == [operator, "Cast"], "changed: the casts are there"
        ours, standard, _ = both(TWICE.format(operator), level)
        assert np.array_equal(ours, standard), "changed: a cast that is written twice does not round"
    reached = free_run(session(graph(MEMORY), level).run)
    print(f"{level}: h <- h + 0.001 (1 - h) reaches {reached:.5f}")
    assert reached > 0.9999, "changed: the memory stalls"
standard = free_run(ReferenceEvaluator(graph(MEMORY)).run, 3000)
print(f"by the standard it stalls at {standard:.4f}")
assert standard == 0.755859375
PY

for version in 1.31.1 1.32.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check \
    "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
  "env-$version/bin/python" probe.py
done
echo "as described"
