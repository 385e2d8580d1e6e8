"""open_sink: opens an output by its name, such as a path or `-`."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path

from stepcell.errors import OutputError, UsageError
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.media.picture_folder import FolderSink
from stepcell.runtime.media.raw_frames import RawSink
from stepcell.runtime.media.sink import Sink
from stepcell.runtime.media.video_writer import VideoSink

__all__ = ["STDOUT", "open_sink"]

STDOUT = "-"
_VIDEOS = (".mp4", ".mkv", ".mov")


def open_sink(text: str, fps: Fraction) -> Sink:
    """Open an output.

    Args:
        text: a .mp4, .mkv, .mov or .npy file, a folder (no suffix; new or empty), or `-` for stdout.
        fps: frames per second of a video.

    Raises:
        UsageError: a file of another kind.
        OutputError: the output cannot be created.
        MissingDependencyError: PyAV, which writes videos and pictures, is not installed.
    """
    if text == STDOUT:
        if sys.stdout is None:
            raise OutputError("stdout: is closed", hint="--output FILE writes to a file")
        # A duplicate, because a thread may still write, and hold the lock of the file, when the interpreter exits.
        return RawSink(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    path = Path(text)
    if path.suffix in _VIDEOS:
        return VideoSink(path, fps)
    if path.suffix == ".npy":
        return ArraySink(path)
    if not path.suffix or _is_folder(path):
        return FolderSink(path)
    raise UsageError(
        f"--output: expected {', '.join(_VIDEOS)}, .npy, a folder or -, got {text!r}",
        hint="a folder name has no suffix; it receives one .png per frame",
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission, or the name is too long; creating the sink reports it
        return False
