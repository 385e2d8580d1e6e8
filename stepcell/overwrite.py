"""Overwrite protection: the one rule for which existing files an output may replace.

An output never replaces a file that is read: an input, or a file that an input refers to. Any other existing file is
replaced if the same command wrote it, which its content shows:

- an ONNX file by the contract in its metadata, a snapshot by the key in its metadata, a sidecar by its fingerprint, an
  engine by the sidecar beside it, a recorded reference and a report by their fields;
- videos, pages and plots by a comment in them, arrays by the length of their header;
- TensorRT's timing caches have no mark: a file is replaced unless it is a checkpoint, a model, an engine or a snapshot;
- an empty file is replaced by all of them.

Everything else is a foreign file: it is refused unless the user asks for `--overwrite`.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from stepcell.contract import METADATA_KEY
from stepcell.errors import DeviceError, InputError, MissingDependencyError, OutputError, UsageError

__all__ = [
    "ARRAY_HEADER",
    "MARK",
    "REFERENCE_KEY",
    "SNAPSHOT_KEY",
    "check_folder",
    "check_output",
    "is_engine",
    "is_exported_model",
    "is_marked",
    "is_no_model",
    "is_reference",
    "is_report",
    "is_sidecar",
    "is_snapshot",
    "referred_files",
]

SNAPSHOT_KEY = "stepcell.snapshot"  # of the metadata of a snapshot
REFERENCE_KEY = "stepcell.reference"  # array with the description of a recorded reference
MARK = "made by stepcell"  # comment of a video, a page or a plot
ARRAY_HEADER = 256  # bytes before the values of a .npy file that stepcell writes; NumPy's own are 128 for a few axes
_MARKED = 1 << 16  # bytes at the beginning and at the end of a file that are searched for the mark
_MOST_HEADER = 100 << 20  # bytes of a safetensors header, as the library limits it
_MODELS = (".onnx", ".engine", ".plan", ".trt", ".pt", ".pth", ".ckpt")
_REPORTS = ({"model", "streams"}, {"model", "frames_per_second"}, {"models", "transfers"})  # fields of each kind
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_AFTER_IR_VERSION = tuple(bytes([field << 3 | 2]) for field in (2, 3, 4, 6, 7, 8, 14))  # next field of an ONNX file


def check_output(
    path: Path,
    written_here: Callable[[Path], bool],
    *,
    reads: Mapping[str | Path, str],
    option: str = "--output",
    overwrite: bool = False,
) -> None:
    """Refuse an output that would replace an input or a foreign file.

    Args:
        path: to be written.
        written_here: whether a file was written by the same command, one of the functions below.
        reads: inputs of the command, with what each is, such as "the model"; names that are no files are skipped.
        option: for the message.
        overwrite: replace foreign files too; never inputs.

    Raises:
        UsageError: the output is refused.
    """
    for name, use in reads.items():
        if _same(path, Path(name)):
            raise UsageError(f"{option} {path}: also used as {use}", hint="choose another name")
    if not _holds_data(path):
        return
    for name, use in reads.items():
        for other in referred_files(Path(name)):
            if _same(path, other):
                raise UsageError(f"{option} {path}: belongs to {use} {name}", hint="choose another name")
    if not overwrite and not written_here(path):
        raise UsageError(
            f"{option} {path}: exists already, and not as a file that this command writes",
            hint="choose another name, or replace it with --overwrite",
        )


def check_folder(path: Path, *, option: str = "--output") -> None:
    """Refuse an output whose folder does not exist or cannot be written, before the work that it would lose.

    Raises:
        OutputError: the output is refused.
    """
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise OutputError(f"{option} {path}: its folder does not exist or cannot be written")


def referred_files(path: Path) -> Iterator[Path]:
    """Files that belong to an input: weights beside an ONNX file, the sidecar and the model of an engine, pictures."""
    sidecar = path.with_name(path.name + ".json")
    with contextlib.suppress(OSError, ValueError):  # a name in a damaged sidecar may be none
        if path.is_dir():
            yield from (each for each in path.iterdir() if each.suffix.lower() in _PICTURES)
        elif path.suffix.lower() == ".onnx":
            yield from (path.parent / name for name in _external_data(path))
        elif path.is_file() and is_sidecar(sidecar):
            yield sidecar
            model = _json(sidecar).get("onnx")
            if isinstance(model, str):
                yield path.with_name(model)


def is_exported_model(path: Path) -> bool:
    """Whether a file is an ONNX model with a contract."""
    from stepcell.onnx_model import parse_model

    try:
        _, model = parse_model(path)
    except (InputError, DeviceError, MissingDependencyError):
        return False
    return any(entry.key == METADATA_KEY for entry in model.metadata_props)


def is_sidecar(path: Path) -> bool:
    """Whether a file is the sidecar of an engine, damaged or not."""
    return {"fingerprint", "profiles", "contract"} <= _json(path).keys()


def is_engine(path: Path) -> bool:
    """Whether a file is an engine with its sidecar beside it."""
    return is_sidecar(path.with_name(path.name + ".json"))


def is_snapshot(path: Path) -> bool:
    """Whether a file is a snapshot."""
    with contextlib.suppress(OSError, msgspec.DecodeError, ValueError, RecursionError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= min(_MOST_HEADER, os.fstat(file.fileno()).st_size):
            header = msgspec.json.decode(file.read(length), type=dict[str, Any])
            metadata = header.get("__metadata__")
            return isinstance(metadata, dict) and SNAPSHOT_KEY in metadata
    return False


def is_report(path: Path) -> bool:
    """Whether a file is a JSON report of `stepcell run` or `stepcell bench`."""
    fields = _json(path).keys()
    return any(marks <= fields for marks in _REPORTS)


def is_reference(path: Path) -> bool:
    """Whether a file is a reference that `stepcell verify --record` wrote."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return f"{REFERENCE_KEY}.npy" in archive.namelist()
    return False


def is_marked(path: Path) -> bool:
    """Whether a file is a video, an array, a page or a plot that stepcell wrote."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(_MARKED)
        if head.startswith(b"\x93NUMPY\x01\x00"):
            return int.from_bytes(head[8:10], "little") + 10 == ARRAY_HEADER
        file.seek(max(0, os.fstat(file.fileno()).st_size - _MARKED))
        return MARK.encode() in head or MARK.encode() in file.read()
    return False


def is_no_model(path: Path) -> bool:
    """Whether a file is none that was trained, exported, built or saved: no checkpoint, model, engine or snapshot.

    Checkpoints are pickles, archives (also .npz) and safetensors.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(16)
        pickle, archive, safetensors = head[:1] == b"\x80", head.startswith(b"PK"), head[8:9] == b"{"
        onnx = head[:1] == b"\x08" and head[2:3] in _AFTER_IR_VERSION
        known = pickle or archive or safetensors or onnx or path.suffix.lower() in _MODELS
        return not (known or is_sidecar(path) or is_engine(path))
    return False


def _holds_data(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file: spelled otherwise, or by symbolic or hard links."""
    with contextlib.suppress(OSError, ValueError):
        # Unlike Path.resolve, realpath accepts a loop of symbolic links.
        if os.path.realpath(one) == os.path.realpath(other):
            return True
    with contextlib.suppress(OSError, ValueError):
        return one.samefile(other)
    return False


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, msgspec.DecodeError, ValueError, RecursionError):
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    return {}


def _external_data(path: Path) -> set[str]:
    """Names of the files with weights of an ONNX file; none if it cannot be read."""
    from stepcell.onnx_model import external_files, parse_model

    try:
        return external_files(parse_model(path)[1])
    except (InputError, DeviceError, MissingDependencyError):
        return set()
