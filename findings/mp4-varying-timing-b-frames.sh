#!/usr/bin/env bash
# FFmpeg declares an .mp4 with B-frames and varying timing shorter than it is; written in fragments it ends a frame early.
#
# Versions:  PyAV 18.1.0 (FFmpeg 8.1, libx264), numpy 2.4.6, Python 3.11, Linux x86-64; the same with PyAV 17.1.0 and
#            19.0.2, and with the command `ffmpeg -i in.mkv -fps_mode passthrough -c:v libx264 out.mp4` of FFmpeg 9.0.2.
# Input:     9 frames at 0, 0.04, 0.08, 0.5, 0.54, 1.2, 1.24, 2.0 and 2.5 s, as a camera that drops frames gives them.
# Behaviour: an .mp4 stores decoding times as sample durations. With B-frames the decoding time lags behind; at a constant
#            rate by a constant, but with gaps by as much as the last gaps are long. The muxer takes the end of the last
#            decoding time for the end of the track and writes it as the duration, and in a finished hybrid-fragmented file
#            also as the length of the edit list, behind which a demuxer discards frames. Matroska has no such field.
# Seen:      duration 1.36 s instead of 2.54 s in .mp4; with movflags hybrid_fragmented and delay_moov 8 of 9 frames are
#            read back. With bf=0: 2.54 s and 9 frames.
# Whom:      recordings of live streams with their own time stamps: players stop, and editors cut, where the header says
#            that the file ends. Switching B-frames off for varying timing helps.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
from fractions import Fraction

import av
import numpy as np

TIMES = [0, 0.04, 0.08, 0.5, 0.54, 1.2, 1.24, 2.0, 2.5]
HYBRID = {"movflags": "+hybrid_fragmented+delay_moov", "frag_duration": "1000000"}


def written(name, b_frames, **options):
    """Duration in the header, and number of frames that are read back."""
    with av.open(name, "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": str(b_frames)})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90000)
        for number, seconds in enumerate(TIMES):
            pixels = np.full((48, 64, 3), 20 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.duration = round(seconds * 90000), Fraction(1, 90000), 3600
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(name) as container:
        return container.duration / 1e6, sum(1 for _ in container.decode(video=0))


print("PyAV", av.__version__)
found = {
    "mkv": written("a.mkv", 3),
    "mp4": written("a.mp4", 3),
    "mp4, hybrid": written("b.mp4", 3, **HYBRID),
    "mp4, no B-frames": written("c.mp4", 0),
    "mp4, hybrid, no B-frames": written("d.mp4", 0, **HYBRID),
}
for kind, (seconds, frames) in found.items():
    print(f"{kind}: {seconds:.2f} s, {frames} of {len(TIMES)} frames")
assert [frames for _, frames in found.values()] == [9, 9, 8, 9, 9], "changed: frames that are read back"
assert [round(seconds, 2) for seconds, _ in found.values()] == [2.54, 1.36, 1.36, 2.54, 2.54], "changed: duration"
PY

python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6
env/bin/python probe.py
echo "as described"
