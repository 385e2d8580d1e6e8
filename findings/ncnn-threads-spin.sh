#!/usr/bin/env bash
# ncnn's wheel: where other programs want the cores, a step with as many threads as cores takes many times as long.
#
# Versions:  ncnn 1.0.20261020 from PyPI (with its own copy of libgomp), numpy 2.4.6, Python 3.11, Linux x86-64.
# Input:     12 convolutions 3x3 of 32 channels, 64x64; a busy process for every core.
# Behaviour: every layer ends with waits of its threads for each other. The OpenMP library spins in them, as long as it
#            does not know of more threads than cores, and so burns the time slice in which the awaited thread, which
#            the busy process has displaced, could go on. Option.openmp_blocktime, which ncnn has for this, does nothing
#            with libgomp. OMP_WAIT_POLICY=passive cures it, if it is set before ncnn is imported.
# Seen:      two cores: 28 ms a step with sleeping threads, 1118 ms with spinning ones.
# Whom:      whoever decodes or encodes beside a network, or shares a machine; a benchmark alone on it shows nothing.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
busy=()
trap 'kill "${busy[@]}" 2> /dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import os
import sys
import time

import ncnn
import numpy as np

LAYERS, CHANNELS, SIZE = 12, 32, 64
net = ncnn.Net()
net.opt.num_threads = os.cpu_count()
net.opt.openmp_blocktime = 0
count = CHANNELS * CHANNELS * 9
lines = [f"Convolution {i} 1 1 b{i} b{i + 1} 0={CHANNELS} 1=3 4=1 6={count}" for i in range(LAYERS)]
net.load_param_mem("\n".join(["7767517", f"{LAYERS + 1} {LAYERS + 1}", "Input x 0 1 b0", *lines]) + "\n")
with open("weights.bin", "wb") as file:
    for _ in range(LAYERS):
        file.write(bytes(4) + np.full(count, 1e-3, np.float32).tobytes())
net.load_model("weights.bin")
x = ncnn.Mat((SIZE, SIZE, CHANNELS))
x.fill(1.0)
times = []
for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    extractor = net.create_extractor()
    extractor.input("b0", x)
    extractor.extract(f"b{LAYERS}")
    times.append(time.perf_counter() - started)
print(np.mean(times[5:]) * 1e3)
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check ncnn==1.0.20261020 numpy==2.4.6
env/bin/python probe.py 20 > /dev/null
for _ in $(seq "$(nproc)"); do
  (while :; do :; done) &
  busy+=($!)
done
spinning=$(env/bin/python probe.py 60)
sleeping=$(OMP_WAIT_POLICY=passive env/bin/python probe.py 60)
echo "mean of a step beside busy processes: ${spinning} ms with spinning threads, ${sleeping} ms with sleeping ones"
env/bin/python -c "assert $spinning > 2 * $sleeping, 'changed: spinning costs little'"
echo "as described"
