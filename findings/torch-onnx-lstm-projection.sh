#!/usr/bin/env bash
# torch.onnx.export(dynamo=True) writes an LSTM with a projection as a plain LSTM of the projected size, without a word.
#
# Versions:  torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.31.1 (CPU), numpy 2.4.6, Python 3.11.
# Input:     nn.LSTM(6, 8, proj_size=4): 8 cells of 6 inputs, whose h is projected to 4. ONNX has no such LSTM.
# Behaviour: the export succeeds. In the file hidden_size is 4 and the projection weight_hr is gone. Of the 32 rows of
#            weights (4 gates of 8 cells) rows 0 to 15 are left, taken for 4 gates of 4. onnx.checker passes, its full check
#            does not. ONNX Runtime loads the file with a warning and fails in the first step: initial_c has 8 features.
#            The older exporter (dynamo=False) refuses: "Unsupported: ONNX export of operator LSTM, LSTMs with projections".
# Whom:      whoever exports a speech or sensor model with proj_size: the export looks fine, and the device fails.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

torch.manual_seed(0)
lstm = torch.nn.LSTM(6, 8, proj_size=4, batch_first=True).eval()
example = torch.rand(1, 3, 6), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 8))
model = torch.onnx.export(lstm, example, dynamo=True, verbose=False).model_proto
onnx.checker.check_model(model)

(node,) = [node for node in model.graph.node if node.op_type == "LSTM"]
hidden = next(attribute.i for attribute in node.attribute if attribute.name == "hidden_size")
weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
shapes = [weights[name].shape for name in node.input[1:4]]
print("hidden_size", hidden, "W, R, B", shapes)
assert (hidden, shapes) == (4, [(1, 16, 6), (1, 16, 4), (1, 32)])
projection = lstm.weight_hr_l0.detach().numpy()
assert not any(array.shape[-2:] in ((4, 8), (8, 4)) for array in weights.values()), "weight_hr is nowhere"
W, ours = weights[node.input[1]][0], lstm.weight_ih_l0.detach().numpy()
rows = [next((place for place, other in enumerate(ours) if (row == other).all()), None) for row in W]
print("W has the rows", rows, "of 32")
assert rows == [*range(0, 4), *range(12, 16), *range(4, 8), *range(8, 12)]
print("the projection", projection.shape, "is not in the file")

session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
arrays = [example[0].numpy(), *(state.numpy() for state in example[1])]
try:
    session.run(None, dict(zip([value.name for value in session.get_inputs()], arrays)))
except Exception as error:
    print(str(error).splitlines()[0][-90:])
    assert "initial_c must have shape {1,1,4}" in str(error)
else:
    raise SystemExit("it runs")
PY
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 onnxruntime==1.31.1 onnx==1.23.2 onnxscript==0.7.2 \
    numpy==2.4.6
env/bin/python probe.py 2> /dev/null
