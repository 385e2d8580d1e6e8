#!/usr/bin/env bash
# expelliarmus adds 4096 us for good where EVT 3.0's time carries over, and 71.6 minutes where a DAT goes back by 1 us.
#
# Versions:  expelliarmus 1.1.12, numpy 1.26.4, Python 3.11, Linux x86-64.
# Input:     EVT 3.0: events at 4106, 7936, 8197 and 8198 us, so that TIME_HIGH goes up and TIME_LOW starts again; the
#            same with a trigger word; a DAT of 100, 99 and 101 us.
# Behaviour: EVT 3.0: a TIME_LOW below the one before counts as an overflow of 4096 us, also when a TIME_HIGH word has
#            already said so: each carry is added twice, and later times stay ahead. An EXT_TRIGGER word (0xA), which
#            the format allows in every recording, ends the reading: `read` returns None. DAT: any decrease counts as a
#            turn of the 32-bit counter, 4,294,967,296 us.
# Seen:      [4106, 7936, 12293, 12294]; None; [100, 4294967395, 4294967397].
# Whom:      whoever cuts windows by time: a recording with steady events lasts twice as long; published DAT sets hold
#            decreases of some microseconds, after which everything is 71.6 minutes later.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import struct

from expelliarmus import Wizard

HEADER = b"% evt 3.0\n% format EVT3;height=480;width=640\n% geometry 640x480\n% end\n"
FIRST, LATER = [0x8001, 0x600A, 0x0010, 0x2805], [0x6F00, 0x2806, 0x8002, 0x6005, 0x2807, 0x8002, 0x6006, 0x2808]
for name, words in (("carry", FIRST + LATER), ("trigger", [*FIRST, 0xA001, *LATER])):
    with open(f"{name}.raw", "wb") as file:
        file.write(HEADER + struct.pack(f"<{len(words)}H", *words))
with open("back.dat", "wb") as file:
    file.write(b"% Data file containing CD events\n% Version 2\n% Height 480\n% Width 640\n\x0c\x08")
    for t in (100, 99, 101):
        file.write(struct.pack("<II", t, 1 << 28 | 4 << 14 | 3))

carried = Wizard(encoding="evt3").read("carry.raw")["t"].tolist()
print("EVT 3.0, true [4106, 7936, 8197, 8198]:", carried)
assert carried == [4106, 7936, 12293, 12294], "changed: EVT 3.0"
triggered = Wizard(encoding="evt3").read("trigger.raw")
print("with a trigger:", triggered)
assert triggered is None, "changed: a recording with a trigger is read"
back = Wizard(encoding="dat").read("back.dat")["t"].tolist()
print("DAT, true [100, 99, 101]:", back)
assert back == [100, 4294967395, 4294967397], "changed: DAT"
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check expelliarmus==1.1.12 numpy==1.26.4
env/bin/python probe.py
echo "as described"
