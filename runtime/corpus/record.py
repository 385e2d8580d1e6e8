"""Records of finished clips: by which model and options an output was made, from which input.

`OUT/.stepcell-map/a/clip.mp4.json` belongs to `OUT/a/clip.mp4`. It is written after the output is in place and removed
before the output is replaced, so an output with a record is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec

from stepcell.errors import InputError
from stepcell.files import read_bytes, sha256_file, write_atomic
from stepcell.json_text import decode_json
from stepcell.overwrite import referred_files
from stepcell.seal import ZEROS, check_seal, sealed

__all__ = ["FOLDER", "Record", "model_sha256", "output_size", "read_record", "record_path", "write_record"]

FOLDER = ".stepcell-map"  # in the folder of the outputs
SCHEMA = "1.0"
_FIELD = b'"checksum": "'

logger = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What made an output.

    Attributes:
        schema: version `major.minor`; a record of another major version counts as none.
        stepcell: version of stepcell.
        model: `model_sha256` of the model.
        options: those that change a result and are not at their default.
        input: the clip, for people.
        input_size, input_modified: bytes of the clip, and its time of change in nanoseconds.
        output_size: as of `output_size`.
        frames: frames of the clip.
        seconds: from its first to its last frame.
        checksum: SHA-256 of the record with zeros in place of this field.
    """

    schema: str = SCHEMA
    stepcell: str
    model: str
    options: dict[str, Any]
    input: str
    input_size: int
    input_modified: int
    output_size: int
    frames: int
    seconds: float
    checksum: str = ZEROS


def record_path(root: Path, output: Path) -> Path:
    """Where the record of an output in the folder `root` is."""
    name = output.relative_to(root)
    return root / FOLDER / name.with_name(f"{name.name}.json")


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically; its `checksum` is computed here.

    Raises:
        OutputError: it cannot be written.
        OSError: its folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    blank = msgspec.structs.replace(record, checksum=ZEROS)
    write_atomic(path, sealed(msgspec.json.format(msgspec.json.encode(blank), indent=1), _FIELD))


def read_record(path: Path) -> Record | None:
    """The record in a file; None: there is none. One that is damaged counts as none, with a warning."""
    if not path.is_file():
        return None
    with contextlib.suppress(InputError):
        data = read_bytes(path)
        record = decode_json(data, Record, str(path))
        if record.schema.split(".")[0] == SCHEMA.split(".")[0] and not check_seal(data, _FIELD, record.checksum):
            return record
    logger.warning(f"{path}: is damaged, or of another stepcell; its clip is run again")
    return None


def output_size(path: Path) -> int:
    """Bytes of an output: of a file, or of all files in a folder of pictures.

    Raises:
        OSError: it cannot be read.
    """
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else path.stat().st_size


def model_sha256(path: Path) -> str:
    """SHA-256 of a model: of its file, or of the digests of the file and those of the weights beside it.

    Raises:
        InputError: it cannot be read.
    """
    own = sha256_file(path)
    beside = sorted(referred_files(path)) if path.suffix.lower() == ".onnx" else []
    return hashlib.sha256("".join([own, *map(sha256_file, beside)]).encode()).hexdigest() if beside else own
