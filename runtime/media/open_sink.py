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
from stepcell.runtime.media.source import Source
from stepcell.runtime.media.video_writer import VideoSink

__all__ = ["STDOUT", "VIDEOS", "open_sink"]

STDOUT = "-"
VIDEOS = (".mp4", ".mkv", ".mov")


def open_sink(
    text: str,
    fps: Fraction,
    *,
    like: Source | None = None,
    varying: bool = False,
    audio: Path | None = None,
) -> Sink:
    """Open an output.

    Args:
        text: a .mp4, .mkv, .mov or .npy file, a folder (no suffix; new or empty), or `-` for stdout.
        fps: frames per second of a video.
        like: source whose pixel aspect and colour a video has.
        varying: the frames of a video may have any timestamps.
        audio: file whose sound is copied into a video.

    Raises:
        UsageError: a file of another kind, or one that cannot hold the sound.
        InputError: the file of the sound has none.
        OutputError: the output cannot be created.
        MissingDependencyError: PyAV, which writes videos and pictures, is not installed.
    """
    path = Path(text)
    if path.suffix.lower() in VIDEOS and text != STDOUT:
        return VideoSink(path, fps, like=like, varying=varying, audio=audio)
    if audio is not None:
        raise UsageError(f"--audio copy: {text} is no video", hint=f"--output with one of {', '.join(VIDEOS)}")
    if text == STDOUT:
        if sys.stdout is None:
            raise OutputError("stdout: is closed", hint="--output FILE writes to a file")
        # A duplicate, because a thread may still write, and hold the lock of the file, when the interpreter exits.
        return RawSink(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    if path.suffix.lower() == ".npy":
        return ArraySink(path)
    if not path.suffix or _is_folder(path):
        return FolderSink(path)
    raise UsageError(
        f"--output: expected {', '.join(VIDEOS)}, .npy, a folder or -, got {text!r}",
        hint="a folder name has no suffix; it receives one .png per frame",
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission, or the name is too long; creating the sink reports it
        return False
