"""Folders of numbered pictures as source and sink."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, OutputError
from stepcell.files import Temporary
from stepcell.nv12 import Nv12
from stepcell.optional_imports import require
from stepcell.runtime.media.recovery import recover_recordings
from stepcell.runtime.media.sink import output_errors
from stepcell.runtime.media.source import Source
from stepcell.runtime.media.video_reader import VideoSource

__all__ = ["PICTURES", "FolderSink", "FolderSource", "matching_pictures", "natural_key"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class FolderSource(Source):
    """The pictures of a folder in natural order: frame2.png before frame10.png.

    Args:
        folder: with the pictures; other files in it are ignored.
        files: the pictures, if they are chosen by a pattern.
        nv12: give them as NV12 of this matrix and range.

    Raises:
        InputError: the folder cannot be read or contains no picture.
        MissingDependencyError: PyAV is not installed.
    """

    pixels = True

    def __init__(self, folder: Path, files: Sequence[Path] | None = None, nv12: Nv12 | None = None) -> None:
        self._nv12 = nv12
        require("av", extra="video", purpose="reading pictures")
        self.name = str(folder)
        try:
            files = files or [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()]
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
        self._files = sorted(files, key=lambda path: natural_key(path.name))
        if not files:
            raise InputError(f"{folder}: contains no picture ({', '.join(PICTURES)})")
        self.length = len(files)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for path in self._files:
            with contextlib.closing(VideoSource(str(path), self._nv12)) as picture:
                pixels = next(iter(picture))
            self.colour, self.pixel_aspect = picture.colour, picture.pixel_aspect
            yield pixels


class FolderSink:
    """A folder of 000000.png, 000001.png, ...; written under a temporary name and renamed by `close`.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be created.
        MissingDependencyError: PyAV is not installed.
    """

    takes_pixels = True
    replaces = False

    def __init__(self, folder: Path) -> None:
        self._av = require("av", extra="video", purpose="writing pictures")
        self.name = str(folder)
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                what = "holds files" if folder.is_dir() else "is a file"
                raise OutputError(f"{folder}: {what} already", hint="name a new or an empty folder")
            self._folder = folder.resolve()  # the target of a link, because a link cannot be replaced by a folder
            if self._folder.is_mount() or self._folder == Path.cwd():
                what = "a mount point" if self._folder.is_mount() else "the working folder"
                raise OutputError(f"{folder}: is {what}, which cannot be replaced", hint="name a new folder in it")
            recover_recordings(self._folder.parent)
            self._temporary = Temporary(self._folder, folder=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{folder}: cannot be written ({reason})") from error
        self._codec: Any = None
        self._count = 0

    def write(self, frame: NDArray[Any]) -> None:
        grey = frame.shape[2] == 1
        pixel_format = "gray" if grey else "rgb24"
        with output_errors(self.name, self._av.FFmpegError):
            if self._codec is None or (self._codec.height, self._codec.width) != frame.shape[:2]:
                self._codec = self._av.CodecContext.create("png", "w")
                self._codec.height, self._codec.width = frame.shape[:2]
                self._codec.pix_fmt, self._codec.time_base = pixel_format, Fraction(1, 25)
                self._codec.thread_count = 1  # with more threads the encoder delays its output
            pixels = np.ascontiguousarray(frame[..., 0] if grey else frame)
            (packet,) = self._codec.encode(self._av.VideoFrame.from_ndarray(pixels, pixel_format))
            self._next_picture().write_bytes(bytes(packet))
        self._count += 1

    def _next_picture(self) -> Path:
        return self._temporary.path / f"{self._count:06d}.png"

    def close(self) -> None:
        name = self.name
        try:
            self._temporary.move_into_place()  # fails if the folder is no longer empty
        except OutputError as error:
            self.name = str(self._temporary.path)
            reason = getattr(error.__cause__, "strerror", None)
            raise OutputError(f"{name}: cannot be written ({reason})", hint=error.hint) from error

    def salvage(self) -> int:
        if not self._count:
            self.abandon()
        elif self._temporary.kept is None:
            with contextlib.suppress(OSError):
                self._next_picture().unlink(missing_ok=True)  # it is incomplete
            with contextlib.suppress(OutputError):
                self.close()
        return self._count

    def abandon(self) -> None:
        self._temporary.delete()


def matching_pictures(pattern: str) -> list[Path]:
    """The pictures that a pattern such as `frames/*.png` names."""
    found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return [each for each in found if each.suffix.lower() in PICTURES]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares runs of digits as numbers."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", name))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts, name  # the name itself orders 1.png and 01.png
