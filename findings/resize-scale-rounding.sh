#!/usr/bin/env bash
# torch and ONNX Runtime disagree about the size of an image that is resized by a factor, for a fifth of all factors.
#
# Versions:  torch 2.13.0, onnxruntime 1.31.1 (CPU), onnx 1.23.2, onnxscript 0.7.2, numpy 2.4.6, Python 3.11.
# Input:     F.interpolate(x, scale_factor=r, mode="bilinear"), exported with dynamic sizes by torch.onnx.export: one
#            Resize node with scales. r is 0.01, 0.02, ... 1.00; the heights are those for which height * r is whole.
# Behaviour: both round the product down, torch height * r in float64, ONNX Runtime in float32. It may lie just below the
#            whole number in the one and not in the other: the exported graph then returns one row more or less than the
#            module it was exported from. A comparison at one size does not show it.
# Seen:      22 of 100 factors differ at some height below 17000, half of them because torch is below and half because
#            ONNX Runtime is. 0.7 of 360 rows: torch 251, ONNX Runtime 252, which is 360 * 0.7. 0.65 of 180 rows: torch
#            117, which is 180 * 0.65, ONNX Runtime 116.
# Whom:      models with a downsample ratio, such as video matting: a state or a skip connection of one size meets one of
#            the other, at some sizes of the camera only, or the picture is off by a row.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
from fractions import Fraction

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F

LARGEST = 17000


class Resize(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)


def exported(factor):
    size = torch.export.Dim.AUTO
    frame = torch.zeros(1, 1, 128, 128)
    program = torch.onnx.export(Resize(factor), (frame,), dynamo=True, dynamic_shapes=({2: size, 3: size},), verbose=False)
    model = program.model_proto
    assert [node.op_type for node in model.graph.node] == ["Resize"]
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def heights(factor, session, candidates):
    for height in candidates:
        x = np.zeros((1, 1, height, 128), np.float32)
        (y,) = session.run(None, {session.get_inputs()[0].name: x})
        yield height, Resize(factor)(torch.from_numpy(x)).shape[2], y.shape[2]


differing = {}
for percent in range(1, 101):
    ratio, factor = Fraction(percent, 100), percent / 100
    whole = np.arange(ratio.denominator, LARGEST, ratio.denominator)
    wide = np.floor(whole * factor)
    narrow = np.floor(whole.astype(np.float32) * np.float32(factor))
    suspects = whole[wide != narrow]
    if not len(suspects):
        continue
    session = exported(factor)
    found = next((each for each in heights(factor, session, map(int, suspects[:3])) if each[1] != each[2]), None)
    if found:
        height, ours, ort = differing[factor] = found
        print(f"{factor}: {height} rows become {ours} in torch, {ort} in ONNX Runtime; exactly {height * ratio}")
print(len(differing), "of 100 factors")
assert list(heights(0.7, exported(0.7), [360])) == [(360, 251, 252)]
assert list(heights(0.65, exported(0.65), [180])) == [(180, 117, 116)]
assert len(differing) == 22
PY
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 onnxruntime==1.31.1 onnx==1.23.2 onnxscript==0.7.2 \
    numpy==2.4.6
env/bin/python probe.py 2> /dev/null
