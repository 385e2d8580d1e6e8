"""Folders and patterns of clips: which clips an input names, and where the output of each goes."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from stepcell.errors import InputError, UsageError
from stepcell.runtime.media.events.formats import EVENT_CLIPS, is_event_file
from stepcell.runtime.media.open_sink import STDOUT, VIDEOS
from stepcell.runtime.media.open_source import STDIN, is_remote
from stepcell.runtime.media.picture_folder import PICTURES, natural_key

__all__ = ["clip_outputs", "find_clips"]

# Suffixes of the files in a folder that are clips; a pattern may name any others.
_CLIPS = (
    *VIDEOS, ".m4v", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".mxf",
    ".y4m", ".gif", ".npy", *EVENT_CLIPS,
)  # fmt: skip


def find_clips(text: str) -> list[Path] | None:
    """The clips that an input names, in natural order; None: it names one stream.

    Args:
        text: a folder of clips, or a pattern such as `clips/*.mp4`, in which `**` stands for folders of any depth.

    Raises:
        UsageError: clips and pictures, so that it is not clear what is meant.
        InputError: a pattern that no file matches, or a folder that cannot be read.
    """
    if text == STDIN or is_remote(text):
        return None
    path = Path(text)
    try:
        if path.is_dir():
            if is_event_file(path):
                return None
            clips = [each for each in path.iterdir() if each.suffix.lower() in _CLIPS and each.is_file()]
            pictures = [each for each in path.iterdir() if each.suffix.lower() in PICTURES and each.is_file()]
        elif path.exists() or not glob.has_magic(text):
            return None
        else:
            found = [Path(each) for each in glob.glob(text, recursive=True)]  # noqa: PTH207
            if not found:
                raise InputError(f"{text}: no file matches")
            pictures = [each for each in found if each.suffix.lower() in PICTURES]
            clips = [each for each in found if each not in pictures and each.is_file()]
    except OSError as error:
        raise InputError(f"{text}: cannot be read ({error.strerror})") from error
    if clips and pictures:
        raise UsageError(
            f"--input {text}: holds {len(clips)} clips and {len(pictures)} pictures",
            hint=f"name what is meant, such as --input '{clips[0].parent / '*'}{clips[0].suffix}'",
        )
    return sorted(clips, key=lambda each: natural_key(str(each))) or None


def clip_outputs(text: str | None, clips: Sequence[Path], output: str) -> list[Path]:
    """Output of each clip: in a folder under its own name, or by a pattern such as `denoised/*.mkv`.

    Args:
        text: the input that named the clips; folders below it are kept. None: a list did, and folders are kept as they
            are written, as `rsync --relative` does.
        clips: of `find_clips`, or of the list.
        output: a folder, in which a video becomes a video and an array an array; or a pattern whose `*` becomes the
            name of the clip without its suffix.

    Raises:
        UsageError: one file for several clips, or two clips with one output.
    """
    pattern = Path(output)
    if output == STDOUT or ("*" not in pattern.name and pattern.suffix):
        raise UsageError(
            f"--output {output}: one file for {len(clips)} clips",
            hint="name a folder, or a pattern such as 'out/*.mkv'; each clip gets an output of its own name",
        )
    root = None if text is None else Path(text) if Path(text).is_dir() else _fixed_part(text)
    outputs: dict[Path, Path] = {}
    for clip in clips:
        name = _as_written(clip) if root is None else clip.relative_to(root)
        if "*" in pattern.name:
            target = pattern.parent / name.parent / pattern.name.replace("*", clip.stem)
        else:
            suffix = clip.suffix.lower()
            target = pattern / name.with_suffix(suffix if suffix in (*VIDEOS, ".npy") else ".mp4")
        if target in outputs:
            raise UsageError(f"--output {output}: {outputs[target]} and {clip} would both be written to {target}")
        outputs[target] = clip
    return list(outputs)


def _as_written(clip: Path) -> Path:
    """A path without the root, below which it can be kept."""
    name = clip.relative_to(clip.anchor)
    if ".." in name.parts:
        raise UsageError(f"{clip}: its output would lie outside the folder of the outputs", hint="name it without ..")
    return name


def _fixed_part(pattern: str) -> Path:
    """The folder of a pattern up to its first wildcard."""
    folder = Path()
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        folder /= part
    return folder
