#!/usr/bin/env bash
# libx264: on CPUs with AVX-512 the same frames give another file with every run, from memory that was never written.
#
# Versions:  PyAV 18.1.0 (libx264 in its wheel) and, built by somebody else, FFmpeg 9.0.2 in imageio-ffmpeg 0.8.1;
#            Linux x86-64 with glibc, Python 3.11 to 3.13.
# Input:     60 frames of 176x144, made here from a seed; one encoder thread; default options of libx264 otherwise.
# Behaviour: the macroblock-tree rate control reads memory that nobody initialised where it runs its AVX-512 code. What
#            lies on the heap decides about bit rate and picture: sizes of the same clip differ by several per cent (30%
#            seen on another clip). glibc's MALLOC_PERTURB_, which fills fresh memory with one byte, makes that visible at will; without
#            it files of two runs differ now and then.
#            x264-params asm=AVX2 (and no-mbtree=1, rc-lookahead=0, tune=zerolatency, preset=superfast) give one file.
# Seen:      libx264 in PyAV 18.1.0: 4 files from 4 runs; with asm=AVX2: 1 file. The same with FFmpeg 9.0.2.
# Whom:      tests and caches that compare encoded files, builds that must be reproducible, and whoever pays for the bits:
#            one thread is widely taken to make x264 deterministic.
#
# Exit code 0: behaves as described. 2: this CPU has no AVX-512, nothing was shown. Anything else: it has changed.
set -euo pipefail

if ! grep -qw avx512bw /proc/cpuinfo; then
  echo "no AVX-512 here: nothing shown"
  exit 2
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6 imageio-ffmpeg==0.8.1

cat > frames.py <<'PY'
import numpy as np


def frames():
    """Luma waves that move, with noise; chroma grey. (216, 176) uint8, planes of yuv420p below each other."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:144, :176]
    for t in range(60):
        luma = 127 + 100 * np.sin((x + 3 * t) / 17) * np.cos((y - 2 * t) / 23)
        luma = (luma.astype(int) + rng.integers(-20, 20, luma.shape)).clip(0, 255)
        yield np.concatenate([luma, np.full((72, 176), 128)]).astype(np.uint8)
PY

cat > pyav.py <<'PY'
import hashlib
import sys

import av
from frames import frames

container = av.open("pyav.h264", "w", format="h264")
stream = container.add_stream("libx264", rate=25, options=dict(word.split("=", 1) for word in sys.argv[1:]))
stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
stream.codec_context.thread_count = 1
for frame in frames():
    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "yuv420p")))
container.mux(stream.encode(None))
container.close()
data = open("pyav.h264", "rb").read()
print(hashlib.sha256(data).hexdigest()[:12], len(data))
PY

env/bin/python - > frames.yuv <<'PY'
import sys

from frames import frames

for frame in frames():
    sys.stdout.buffer.write(frame.tobytes())
PY
ffmpeg=$(env/bin/python -c 'import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())')

pyav() { for fill in 0 1 7 99; do MALLOC_PERTURB_=$fill env/bin/python pyav.py "$@"; done | sort -u; }
binary() {
  for fill in 0 1 7 99; do
    MALLOC_PERTURB_=$fill "$ffmpeg" -loglevel error -y -f rawvideo -pix_fmt yuv420p -s 176x144 -r 25 -i frames.yuv \
      -threads 1 -c:v libx264 "$@" binary.h264
    echo "$(sha256sum binary.h264 | cut -c1-12) $(wc -c < binary.h264)"
  done | sort -u
}

for encoder in pyav binary; do
  "$encoder" > "$encoder-default"
  if [ "$encoder" = pyav ]; then pyav x264-params=asm=AVX2 > pyav-avx2; else binary -x264-params asm=AVX2 > binary-avx2; fi
  echo "$encoder: $(wc -l < "$encoder-default") files from 4 runs; with asm=AVX2: $(wc -l < "$encoder-avx2")"
  sed 's/^/  /' "$encoder-default"
  [ "$(wc -l < "$encoder-default")" -gt 1 ] || { echo "changed: one file from four runs"; exit 1; }
  [ "$(wc -l < "$encoder-avx2")" -eq 1 ] || { echo "changed: asm=AVX2 gives several files"; exit 1; }
done
echo "as described"
