#!/usr/bin/env bash
# PyAV: a frame whose `side_data` was looked at is not freed when it goes out of use, nor are its scaler's threads.
#
# Versions:  PyAV 17.1.0 and 18.1.0 (FFmpeg 8.1), numpy 2.4.6, Python 3.11, Linux x86-64. PyAV 19 frees the frames.
# Input:     60 frames of 64x48 in Matroska, made here.
# Behaviour: `frame.side_data` makes an object that refers to the frame, and the frame keeps it: a cycle, which only the
#            garbage collector finds. It counts Python objects, not the megabytes of pictures behind them, so it runs
#            late. If the frame was also converted (`to_ndarray(format="rgb24")`), a scaling context with two threads for
#            each CPU lives as long as the frame.
# Seen:      on 2 CPUs, with the collector switched off: 60 of 60 frames alive and 126 threads; without looking at
#            side_data 0 frames and 8 threads. With the collector on, up to 225 threads for a clip of 120 frames.
# Whom:      whoever asks every frame of a long stream for its orientation, captions or time code: memory and threads
#            go up and down with the collector, and encoders beside it get slower. Asking the first frame only is enough
#            for the orientation.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import gc
import os

import av
import numpy as np

with av.open("clip.mkv", "w") as container:
    stream = container.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for _ in range(60):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
    container.mux(stream.encode(None))

gc.disable()
print("PyAV", av.__version__)
alive = {}
for look in (False, True):
    threads = 0
    with av.open("clip.mkv") as container:
        for frame in container.decode(video=0):
            if look:
                frame.side_data.get("DISPLAYMATRIX")
            frame.to_ndarray(format="rgb24")
            threads = max(threads, len(os.listdir("/proc/self/task")))
    del frame
    alive[look] = sum(isinstance(each, av.VideoFrame) for each in gc.get_objects())
    print(f"side_data looked at: {look}; frames alive {alive[look]}, threads {threads}")
assert alive == {False: 0, True: 60}, f"changed: frames alive are {alive}"
PY

for version in 17.1.0 18.1.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check "av==$version" numpy==2.4.6
  "env-$version/bin/python" probe.py
done
echo "as described"
