#!/usr/bin/env bash
# Triton: a tensor-memory operand shared by two products is overwritten before the second product has been waited for.
#
# Versions:  triton 3.7.1 and 3.9.0 (the newest when this was written), Linux x86-64, Python 3.10 to 3.13. No GPU needed.
# Target:    compute capability 10.0 (tcgen05); 10.3 and 11.0 compile the same way.
# Input:     a K loop with num_stages=3 whose left tile goes through registers (here tl.where, which clears padding
#            channels) and feeds two tl.dot with accumulators of their own.
# Behaviour: the tile lives in one tensor-memory buffer that is not multi-buffered. In the pipelined loop the compiler
#            waits for the FIRST product of the last iteration, stores the next tile into the buffer, issues both
#            products, and only then waits for the SECOND product of the last iteration, which may still read the buffer.
#            With num_stages=1 both products are waited for before the store.
# Seen:      order of operations in the loop, num_stages=3:
#              wait(product 1)  store(tile)  product 1  product 2  wait(product 2)
# Whom:      everyone who computes two results from one tile that was changed in registers (masked, scaled, converted)
#            on Blackwell data-centre GPUs or Jetson Thor: gated cells, SwiGLU, fused QKV. Results can be wrong without an
#            error. A triton issue about two products in ONE accumulator (triton-lang/triton 10821) is another fault, and
#            takes separate accumulators to be safe.
# Not run:   on a GPU. The order is read from the compiler's output; how often the race is lost is unknown.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import re
import warnings

warnings.filterwarnings("ignore")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def two_products(
    x, w, v, out, out_two, steps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    acc_two = tl.zeros((BM, BN), tl.float32)
    for t in tl.range(0, steps, num_stages=STAGES):
        tile = tl.load(x + m[:, None] * (steps * BK) + t * BK + k[None, :])
        tile = tl.where((k < CHANNELS)[None, :], tile, 0.0)
        rows = (t * BK + k)[:, None] * BN + n[None, :]
        acc = tl.dot(tile, tl.load(w + rows), acc)
        acc_two = tl.dot(tile, tl.load(v + rows), acc_two)
    tl.store(out + m[:, None] * BN + n[None, :], acc)
    tl.store(out_two + m[:, None] * BN + n[None, :], acc_two)


def loop_order(stages):
    names = ["x", "w", "v", "out", "out_two"]
    signature = dict(zip(names, ["*fp16"] * 3 + ["*fp32"] * 2)) | {"steps": "i32"}
    sizes = {"BM": 128, "BN": 64, "BK": 32, "CHANNELS": 20, "STAGES": stages}
    source = ASTSource(
        two_products,
        signature | {name: "constexpr" for name in sizes},
        constexprs=sizes,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
    )
    text = triton.compile(source, target=GPUTarget("cuda", 100, 32), options={"num_warps": 4}).asm["ttgir"]
    (loop,) = re.findall(r"scf\.for .*?scf\.yield", text, re.DOTALL)
    # the loop's own barrier values are handed from one iteration to the next: name each wait by the product it is for
    tile = re.search(r"ttng\.tmem_store \S+, (%\S+?), .*xf16", loop)[1]
    handed = [name.strip() for name in re.search(r"scf\.yield ([^:]*)", text[text.index(loop):])[1].split(",")]
    header = loop[: loop.index("->")]
    taken = re.findall(r"(%\w+) = ", header[header.index("iter_args"):])
    source_of = dict(zip(taken, handed))
    order, products = [], {}
    for operation, rest in re.findall(r"ttng\.(tmem_store|tc_gen5_mma|wait_barrier) (.*)", loop):
        if operation == "tmem_store" and f", {tile}," in rest:
            order.append("store(tile)")
        elif operation == "tc_gen5_mma":
            barrier = re.search(r", (%\w+)\[", rest)[1] if "is_async" in rest else None
            products[barrier] = len(products) + 1
            order.append(f"product {products[barrier]}")
        elif operation == "wait_barrier":
            order.append(("wait", rest.split(",")[0]))
    named = []
    for entry in order:
        if isinstance(entry, tuple):
            barrier = source_of.get(entry[1], entry[1])
            entry = f"wait(product {products.get(barrier, '?')})"
        named.append(entry)
    return named


pipelined = loop_order(3)
print(f"triton {triton.__version__}, num_stages=3:", "  ".join(pipelined))
expected = ["wait(product 1)", "store(tile)", "product 1", "product 2", "wait(product 2)"]
assert pipelined == expected, "changed: the pipelined loop has another order"
PY

for version in 3.7.1 3.9.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version"
  TRITON_CACHE_DIR="$folder/cache-$version" "env-$version/bin/python" probe.py
done
echo "as described"
