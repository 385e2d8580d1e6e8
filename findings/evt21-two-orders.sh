#!/usr/bin/env bash
# EVT 2.1 files come in two orders of the halves of a word; two readers each know one, and read the other as events.
#
# Versions:  evlib 0.13.2, evutils 0.3.18, numpy 2.4.6, Python 3.11, Linux x86-64.
# Input:     four events of 1280x720 in EVT 2.1, once as one little-endian number a word (GenX320), once with the
#            upper half first (IMX636 and older). The header says which, in its format line, as Prophesee writes it:
#            `% format EVT21;height=720;width=1280;endianness=little` or `...endianness=legacy`.
# Behaviour: evlib decodes every file as little-endian, evutils as legacy (it looks for a line `% endianness`, not in
#            the format line). Neither refuses the other order: a time word becomes a vector of falling events.
# Seen:      evlib: 4 events of the little-endian file, others at times such as 8256 us of the legacy one; evutils the
#            other way round.
# Whom:      users of IMX636 recordings with evlib, of GenX320 recordings with evutils: no error, but noise.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import struct

import evlib
from evutils.io import EventReader

# halves of each word: time 2 * 64 us; three pixels of row 200 at 5 us; one of row 100 at 63 us
three, one = 1 << 28 | 5 << 22 | 96 << 11 | 200, 63 << 22 | 64 << 11 | 100
words = [(8 << 28 | 2, 0), (three, 1 | 1 << 7 | 1 << 31), (one, 1 << 4)]
true = [(96, 200, 133), (103, 200, 133), (127, 200, 133), (68, 100, 191)]


def by_evlib(path):
    table = evlib.load_events(path).collect()
    times = table["t"].dt.total_microseconds().to_list()
    return list(zip(table["x"].to_list(), table["y"].to_list(), times))


def by_evutils(path):
    with EventReader(path) as reader:
        return [(int(x), int(y), int(t)) for part in reader for x, y, t in zip(part["x"], part["y"], part["t"])]


for order in ("little", "legacy"):
    lines = f"% evt 2.1\n% format EVT21;height=720;width=1280;endianness={order}\n% geometry 1280x720\n% end\n"
    with open(f"{order}.raw", "wb") as file:
        file.write(lines.encode())
        for word in words:
            file.write(struct.pack("<II", *(word if order == "legacy" else word[::-1])))
for read, known, other in ((by_evlib, "little", "legacy"), (by_evutils, "legacy", "little")):
    right, wrong = read(f"{known}.raw"), read(f"{other}.raw")
    print(read.__name__, known, right, other, wrong[:3], "...")
    assert right == true, f"changed: {read.__name__} no longer reads {known}"
    assert wrong and wrong != true, f"changed: {read.__name__} reads or refuses {other}"
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check evlib==0.13.2 evutils==0.3.18 numpy==2.4.6
env/bin/python probe.py
echo "as described"
