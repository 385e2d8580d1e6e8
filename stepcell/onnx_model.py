"""Reading an ONNX file, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.errors import InputError
from stepcell.files import read_bytes
from stepcell.missing import require

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["read_model"]


def read_model(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of a file and the model in them; weights beside the file are not read.

    Raises:
        InputError: it cannot be read or is not an ONNX model.
        MissingDependencyError: onnx is not installed.
    """
    onnx = require("onnx", extra="rtx", purpose="reading a model")
    data = read_bytes(path)
    model: ModelProto = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, which has a different home in each implementation
        raise InputError(f"{path}: is not an ONNX model ({error})") from error
    if not model.graph.node:
        raise InputError(f"{path}: is not an ONNX model, or one with an empty graph")
    return data, model
