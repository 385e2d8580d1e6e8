"""What FFmpeg may open for an input: the file or address that was named, and nothing that its content names.

A playlist, a `concat` script or a session description in the place of a video would make FFmpeg read other files and
addresses, and it expands `%d` in the name of a picture.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

from stepcell.errors import UsageError
from stepcell.runtime.media.source import display_name

__all__ = ["SCHEMES", "input_options", "lists_files"]

SCHEMES = ("rtsp", "rtsps", "http", "https", "srt", "rtmp", "rtmps", "rtp", "udp", "tcp", "rist", "mmsh", "mmst")
# What these need underneath, and what a stream over HTTP may be encrypted with; never files, pipes or devices.
_BENEATH = ("httpproxy", "tls", "dtls", "udplite", "srtp", "rtmpt", "rtmpts", "rtmpe", "rtmpte", "crypto", "data")
# Demuxers that open what a file names, or devices; `image2` is not among them: `pattern_type` keeps it to one file.
_REFERRING = {
    "alsa", "avisynth", "concat", "concatf", "dash", "fbdev", "hls", "imf", "jack", "kmsgrab", "lavfi", "libgme", "mlv",
    "oss", "pulse", "rtp", "rtsp", "sap", "sdp", "v4l2", "vapoursynth", "video4linux2,v4l2", "vobsub",
    "webm_dash_manifest", "x11grab", "xcbgrab",
}  # fmt: skip
_LISTS = (b"#extm3u", b"ffconcat", b"v=0", b"<?xml", b"<mpd", b"[playlist]", b"file ")


def input_options(name: str, formats: Collection[str]) -> dict[str, str]:
    """Options with which FFmpeg opens a file or a URL.

    Args:
        name: path, or URL with `://`.
        formats: names of the formats that FFmpeg knows.

    Raises:
        UsageError: a URL with another scheme than `SCHEMES`.
    """
    if "://" not in name:
        readable = ",".join(sorted(set(formats) - _REFERRING))
        return {"protocol_whitelist": "file", "format_whitelist": readable, "pattern_type": "none"}
    scheme = name.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise UsageError(
            f"{display_name(name)}: expected a URL of {', '.join(SCHEMES)}, got {scheme!r}",
            hint="a file is named by its path" if scheme == "file" else None,
        )
    return {"protocol_whitelist": ",".join((*SCHEMES, *_BENEATH))}


def lists_files(path: Path) -> bool:
    """Whether a file names other files: a playlist, a script or a session description, by its first bytes."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        head = re.sub(rb"^(\xef\xbb\xbf)?\s*", b"", file.read(64)).lower()
        return head.startswith(_LISTS)
    return False
