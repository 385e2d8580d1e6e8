#!/usr/bin/env bash
# PyAV cannot tell how a photo with EXIF is mirrored: `side_data` raises, and `rotation` says 180 degrees for a mirror.
#
# Versions:  PyAV 17.1.0 and 18.1.0 (FFmpeg 8.1), numpy 2.4.6, Python 3.11, Linux x86-64. PyAV 19 returns the side data.
# Input:     a JPEG of 64x48 pixels with an EXIF block of one entry, Orientation, as every camera and phone writes it.
# Behaviour: FFmpeg 8.1 attaches the EXIF block to the decoded frame as side data of a new type (31), beside the display
#            matrix that follows from it. PyAV lists all side data before it returns any, and its enumeration ends before
#            that type: `frame.side_data` raises ValueError for every such photo, upright ones too. What is left,
#            `frame.rotation`, is the angle of FFmpeg's av_display_rotation_get, which ignores flips: a plain mirror
#            (orientation 2) and half a turn (3) are both -180, a vertical flip (4) is 0 like an upright picture, and
#            5 and 6, 7 and 8 are alike.
# Seen:      side_data: "31 is not a valid Type" for 1 to 8; rotation: 0, -180, -180, 0, -90, -90, 90, 90.
# Whom:      whoever reads photos, or frames of cameras that write EXIF, with PyAV and turns them upright by `rotation`,
#            as examples do: mirrored selfies and scans come out upside down. Reading the tag itself helps.
#
# Exit code 0: behaves as described. Anything else: it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat > probe.py <<'PY'
import struct
from fractions import Fraction

import av
import numpy as np

context = av.CodecContext.create("mjpeg", "w")
context.width, context.height, context.pix_fmt, context.time_base = 64, 48, "yuvj420p", Fraction(1, 25)
context.color_range = 2
picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24").reformat(format="yuvj420p")
data = b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])

print("PyAV", av.__version__)
rotations = []
for orientation in range(1, 9):
    block = b"Exif\0\0II" + struct.pack("<HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    with open("photo.jpg", "wb") as file:
        file.write(data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:])
    with av.open("photo.jpg") as container:
        frame = next(container.decode(video=0))
    rotations.append(frame.rotation)
    try:
        frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:
        print(f"orientation {orientation}: rotation {frame.rotation}, side_data: {error}")
    else:
        raise SystemExit("changed: side_data is returned")
assert rotations == [0, -180, -180, 0, -90, -90, 90, 90], f"changed: rotation is {rotations}"
PY

for version in 17.1.0 18.1.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check "av==$version" numpy==2.4.6
  "env-$version/bin/python" probe.py
done
echo "as described"
