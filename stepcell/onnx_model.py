"""Readers of ONNX files: any model, or an exported one with its contract."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import ContractError, InputError
from stepcell.files import read_bytes
from stepcell.optional_imports import require

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OnnxFile", "read_model", "read_onnx"]


@dataclass(frozen=True)
class OnnxFile:
    """An exported model.

    Attributes:
        path: of the file.
        data: its bytes.
        sha256: of the bytes.
        model: `data`, decoded.
        contract: from its metadata.
    """

    path: Path
    data: bytes
    sha256: str
    model: ModelProto
    contract: StepContract


def read_model(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of a file and the model in them. External weights are not read.

    Raises:
        InputError: it cannot be read or is not an ONNX model.
        MissingDependencyError: onnx is not installed.
    """
    onnx = require("onnx", extra="rtx", purpose="reading a model")
    data = read_bytes(path)
    model: ModelProto = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # DecodeError of protobuf, whose module depends on the implementation
        raise InputError(f"{path}: is not an ONNX model ({error})") from error
    if not model.graph.node:
        raise InputError(f"{path}: is not an ONNX model, or has an empty graph")
    return data, model


def read_onnx(path: Path) -> OnnxFile:
    """Read an exported model and the contract in its metadata.

    Raises:
        InputError: the file cannot be read or is not an ONNX model.
        ContractError: it holds no contract, or one that cannot be used.
        MissingDependencyError: onnx is not installed.
    """
    data, model = read_model(path)
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        raise ContractError(
            f"{path}: has no state contract (metadata {METADATA_KEY!r}), so its states are unknown",
            hint="export it with `stepcell export`, which writes the contract into the file",
        )
    contract = StepContract.from_json(text, subject=f"{path}: contract")
    return OnnxFile(path, data, hashlib.sha256(data).hexdigest(), model, contract)
