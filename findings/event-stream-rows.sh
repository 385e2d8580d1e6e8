#!/usr/bin/env bash
# Event Stream files count rows from the lower edge; event_stream returns them so, faery from the upper edge.
#
# Versions:  event_stream 1.6.3, faery 0.7.1, numpy 2.4.6, Python 3.11, Linux x86-64.
# Input:     a .es of a sensor of 128x100 with one event whose stored y is 10.
# Behaviour: the format's own implementation, sepia.hpp in neuromorphic-paris/event_stream, says that y is 0 at the
#            bottom and increases upwards; neither its README nor that of the Python package does. The Python package of
#            the same authors returns y as stored, so that a picture made as usual is upside down; faery, their later
#            one, returns 99 - y.
# Seen:      y = 10 and y = 89 for the same byte.
# Whom:      whoever trains with one and deploys with the other, or shows events of event_stream as a picture. A turned
#            scene still looks like a scene, so nobody notices.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import struct

import event_stream
import faery

with open("one.es", "wb") as file:  # version 2.0.0, DVS, 128x100; time 5 and rising, x = 50, y = 10
    file.write(b"Event Stream\x02\x00\x00\x01" + struct.pack("<HH", 128, 100) + struct.pack("<BHH", 5 << 1 | 1, 50, 10))
with event_stream.Decoder("one.es") as decoder:
    stored = [int(y) for part in decoder for y in part["y"]]
turned = [int(y) for part in faery.events_stream_from_file("one.es") for y in part["y"]]
print("event_stream", stored, "faery", turned)
assert stored == [10], "changed: event_stream"
assert turned == [89], "changed: faery"
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check event-stream==1.6.3 faery==0.7.1 numpy==2.4.6
env/bin/python probe.py
echo "as described"
