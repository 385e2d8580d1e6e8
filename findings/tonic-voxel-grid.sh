#!/usr/bin/env bash
# tonic's voxel grid drops the last event, has other bins than E2VID, and rewrites the polarity of its caller.
#
# Versions:  tonic 1.7.0, numpy 2.4.6, Python 3.11, Linux x86-64; evlib 0.13.2 has tonic's bins too.
# Input:     three events of three pixels at 0, 500 and 1000 us, the middle one falling, five bins.
# Behaviour: `to_voxel_grid_numpy` names Zhu et al. 2019, whose bins (and those of E2VID's own function) are B - 1 steps
#            apart: t* = (B - 1)(t - t0) / (tN - t0). tonic multiplies by B: an event halfway is shared by bins 2 and 3
#            instead of being in bin 2, and the last event of every window, at t* = B, is outside and dropped. Falling
#            events are set to -1 in place, in the caller's array; in a column of bool, the dtype that aedat and faery
#            give, -1 is True: falling events count as +1, and the caller's events have become rising ones.
# Seen:      bins of the middle event 0, 0, -0.5, -0.5, 0 (int8) and 0, 0, 0.5, 0.5, 0 (bool); of the last event zeros.
# Whom:      whoever feeds a network that was trained with E2VID's grid from tonic, or the other way round: nothing
#            fails, the reconstruction is worse. `export --set events.convention=tonic` of stepcell makes tonic's.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import numpy as np
from tonic.functional import to_voxel_grid_numpy

for kind, sign in (("i1", -0.5), ("?", 0.5)):
    rows = [(0, 0, 0, 1), (1, 0, 500, 0), (2, 0, 1000, 1)]
    events = np.array(rows, [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", kind)])
    grid = to_voxel_grid_numpy(events, (3, 1, 2), n_time_bins=5)[:, 0, 0]
    print(np.dtype(kind), "bins of each event:", grid.T.tolist(), "polarity afterwards:", events["p"].tolist())
    assert grid[:, 0].tolist() == [1, 0, 0, 0, 0], "changed: the first event"
    assert grid[:, 1].tolist() == [0, 0, sign, sign, 0], "changed: the middle event"
    assert not grid[:, 2].any(), "changed: the last event is counted"
    assert events["p"][1] == (-1 if kind == "i1" else True), "changed: the caller's events are kept"
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check tonic==1.7.0 numpy==2.4.6
env/bin/python probe.py
echo "as described"
