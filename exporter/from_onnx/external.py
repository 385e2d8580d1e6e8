"""Weights beside an ONNX file, as torch's exporter writes them: `model.onnx.data`.

The file says where they lie. Only a plain file of its own folder is opened, and only the bytes that
are really there are taken: a path from a file can name any file of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from stepcell.errors import ExportError
from stepcell.files import read_bytes

__all__ = ["take_in"]

_LIMIT = 2**31 - 1  # bytes of one protobuf message


def take_in(tensors: Iterable[onnx.TensorProto], path: Path) -> None:
    """Put the weights that lie beside `path` into the tensors.

    Raises:
        ExportError: a location that is no plain file of the same folder, bytes that are not there,
            or more of them than one ONNX file holds.
        InputError: the file with the weights cannot be read.
    """
    files: dict[str, bytes] = {}
    total = 0
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            files[location] = read_bytes(_beside(path, location, tensor.name))
        data = files[location]
        start, length = _number(entries, "offset", 0), _number(entries, "length", len(data))
        if start < 0 or length < 0 or start + length > len(data):
            raise ExportError(
                f"{path}: weights {tensor.name!r} are bytes {start} to {start + length} of {location!r}, which has "
                f"{len(data)}",
                hint="the two files do not belong together, or one was cut short",
            )
        total += length
        if total > _LIMIT:
            raise ExportError(f"{path}: more than 2 GiB of weights do not fit into one ONNX file")
        tensor.raw_data = data[start : start + length]
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


def _beside(path: Path, location: str, tensor: str) -> Path:
    beside = path.parent / location
    plain = location not in ("", ".", "..") and Path(location).name == location and "\\" not in location
    if not plain or beside.is_symlink() or (beside.exists() and not beside.is_file()):
        raise ExportError(
            f"{path}: weights {tensor!r} lie in {location!r}; only a plain file in the same folder is opened",
            hint="where you trust the file, save it as one: onnx.save(onnx.load(path), path)",
        )
    return beside


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    return int(text) if text.isascii() and text.isdigit() else -1
