"""Readers of ONNX files: any model, or an exported one with its contract."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import ContractError, InputError
from stepcell.external_weights import (
    check_external_weights,
    has_external_weights,
    load_external_weights,
    tensors_of,
)
from stepcell.files import read_bytes
from stepcell.graph_hash import graph_sha256
from stepcell.library_errors import library_errors
from stepcell.model_size import check_model_bytes, check_model_nodes
from stepcell.optional_imports import require

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = [
    "OnnxFile",
    "changes_since_export",
    "contract_text",
    "external_files",
    "missing_contract",
    "parse_model",
    "read_model",
    "read_onnx",
    "repair_hint",
]


@dataclass(frozen=True)
class OnnxFile:
    """An exported model.

    Attributes:
        path: path of the file.
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
    """The bytes of a file and the model in them. External weights are not read, but where they are is checked.

    Raises:
        InputError: it cannot be read, is not an ONNX model, has weights that are not in a plain file beside it, or is
            larger than a limit (`stepcell.limits`).
        DeviceError: not enough memory.
        MissingDependencyError: onnx is not installed.
    """
    data, model = parse_model(path)
    external = check_external_weights(model, path)
    check_model_bytes(len(data) + external, path)
    check_model_nodes(model, path)
    return data, model


def parse_model(path: Path) -> tuple[bytes, ModelProto]:
    """`read_model` without the check of external weights, for programs that open nothing that the file names."""
    onnx = require("onnx", extra="rtx", purpose="reading a model")
    with contextlib.suppress(OSError):
        check_model_bytes(path.stat().st_size, path)
    data = read_bytes(path)
    model: ModelProto = onnx.ModelProto()
    with library_errors(str(path), InputError, what="is not an ONNX model"):
        model.ParseFromString(data)
    if not model.graph.node:
        raise InputError(f"{path}: is not an ONNX model, or has an empty graph")
    return data, model


def contract_text(model: ModelProto) -> str | None:
    """The contract in a model's metadata, as it is written there; None: there is none."""
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)


def missing_contract(subject: object) -> ContractError:
    """The error for a model without a contract."""
    return ContractError(
        f"{subject}: has no state contract (metadata {METADATA_KEY!r}), so its states are unknown",
        hint=f"an ONNX file of another program: stepcell fuse {subject} -o fused.onnx; one that stepcell wrote and "
        f"another tool changed: {repair_hint(subject)}; a checkpoint: stepcell export",
    )


def repair_hint(subject: object) -> str:
    """The command that brings the contract of the original back to an edited file."""
    return f"stepcell fuse --contract original.onnx {subject} -o repaired.onnx"


def read_onnx(path: Path, *, check: bool = True) -> OnnxFile:
    """Read an exported model and the contract in its metadata.

    Args:
        check: refuse a file that has changed since its export; its weights are read for that.

    Raises:
        InputError: the file cannot be read or is not an ONNX model.
        ContractError: it holds no contract, or one that cannot be used, or has changed since its export.
        MissingDependencyError: onnx is not installed.
    """
    data, model = read_model(path)
    text = contract_text(model)
    if text is None:
        raise missing_contract(path)
    contract = StepContract.from_json(text, subject=f"{path}: contract", check=check)
    file = OnnxFile(path, data, hashlib.sha256(data).hexdigest(), model, contract)
    if check and (changes := changes_since_export(file)):
        raise ContractError(
            f"{path}: changed since export: {'; '.join(changes)}",
            hint=f"bring its contract up to date: {repair_hint(path)}; or take the file as it is: --no-check",
        )
    return file


def changes_since_export(file: OnnxFile) -> list[str]:
    """What of a file is no longer as its contract says, one sentence each; nothing for an unchanged file.

    Raises:
        InputError: its weights are in another file, which cannot be read.
    """
    contract, graph = file.contract, file.model.graph
    weights = {tensor.name for tensor in graph.initializer}
    changes = []
    try:
        StepContract.from_json(contract_text(file.model) or "", subject="contract")
    except ContractError as error:
        changes.append(error.message)
    for side, ports, specs in (
        ("inputs", [port for port in graph.input if port.name not in weights], contract.graph_inputs),
        ("outputs", list(graph.output), contract.graph_outputs),
    ):
        expected = {name: str(spec.dtype) for name, spec in specs.items()}
        actual = {port.name: _dtype(port) for port in ports}
        if actual != expected:
            changes.append(f"the graph's {side} differ from its contract: expected {_listed(expected, actual)}")
    if not isinstance(contract.graph_sha256, str):
        return changes
    model = file.model
    try:
        if has_external_weights(model):
            model = type(model).FromString(file.data)
            load_external_weights(model, file.path)
        found = graph_sha256(model)
    except (ValueError, TypeError) as error:
        return [*changes, f"a constant is damaged ({' '.join(str(error).split())[:200]})"]
    if found != contract.graph_sha256:
        changes.append("its graph or its weights have another hash than the contract records")
    return changes


def _dtype(port: ValueInfoProto) -> str:
    onnx = require("onnx", extra="rtx", purpose="reading a model")
    elem = port.type.tensor_type.elem_type
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(elem))
    except KeyError:
        return f"type {elem}"


def _listed(expected: dict[str, str], actual: dict[str, str]) -> str:
    """What differs of two lists of tensors by name and dtype."""
    missing = [f"{name} {dtype}" for name, dtype in sorted(expected.items()) if actual.get(name) != dtype]
    foreign = [f"{name} {dtype}" for name, dtype in sorted(actual.items()) if expected.get(name) != dtype]
    return f"{', '.join(missing) or 'no more'}, got {', '.join(foreign) or 'nothing for it'}"


def external_files(model: ModelProto) -> set[str]:
    """Names of the files in which a model says that its weights lie, as it spells them; they are not trusted."""
    entries = (entry for tensor in tensors_of(model) for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location" and entry.value}
