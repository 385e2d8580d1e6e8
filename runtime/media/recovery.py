"""Recovery of recordings that a killed process left under temporary names."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
from pathlib import Path

import numpy as np

from stepcell.errors import MissingDependencyError, OutputError
from stepcell.files import RECORDINGS, leftovers, visible_path
from stepcell.runtime.media.npy_header import array_header
from stepcell.runtime.media.video_repair import repair_video

__all__ = ["recover_recordings"]

_PNG_END = b"IEND\xaeB`\x82"  # type and checksum of the last chunk

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=256)
def recover_recordings(folder: Path) -> None:
    """Give the recordings of killed processes in a folder a visible name, and delete those without a frame.

    `.clip.1a2b3c4d.stepcell.mp4` becomes `clip.1a2b3c4d.mp4`. Files that a running process writes are left alone. A
    folder is searched once in the life of a process.
    """
    for path, target in leftovers(folder):
        if path.is_file() and target.suffix.lower() not in RECORDINGS:
            continue  # `atomic_path` deletes it
        visible = visible_path(path)
        try:
            frames = _repair(path)
            if frames and not os.path.lexists(visible):
                path.rename(visible)
                logger.warning(f"{visible}: {frames} frames of a run that was killed")
            elif not frames:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (OSError, OutputError, MissingDependencyError) as error:
            logger.warning(f"{path}: is of a run that was killed, and cannot be recovered ({error})")


def _repair(path: Path) -> int:
    """Number of whole frames in a recording; what follows them is cut off."""
    if path.is_dir():
        pictures = sorted(path.glob("*.png"))
        if pictures and not pictures[-1].read_bytes().endswith(_PNG_END):
            pictures.pop().unlink()  # it is incomplete
        return len(pictures)
    if path.suffix.lower() == ".npy":
        return _repair_array(path)
    try:
        return repair_video(path)
    except Exception as error:  # those of FFmpeg, which is not imported here
        if isinstance(error, MissingDependencyError):
            raise
        return 0


def _repair_array(path: Path) -> int:
    """Write the number of frames into the header of a .npy file whose writer was killed."""
    with contextlib.suppress(ValueError, EOFError), path.open("rb+") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            return 0
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start, frame = file.tell(), int(np.prod(shape[1:])) * dtype.itemsize
        count = (path.stat().st_size - start) // frame if frame else 0
        file.truncate(start + count * frame)
        file.seek(0)
        file.write(array_header(dtype, (count, *shape[1:])))
        return count
    return 0
