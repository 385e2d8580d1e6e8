"""Snapshots: what a loop remembers, as a file that another process goes on from.

A .safetensors file: the states by name, and in its metadata one JSON document (`Snapshot`) under
the key `stepcell.snapshot`. It fits every back end and every engine of the same model, and no
other model: what has to agree is in `identity`. A file is put in place whole or not at all, and
its numbers are compared with a checksum when it is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.contract import InitialValue, StateSpec, StepContract
from stepcell.errors import InputError, OutputError, StateError
from stepcell.family_names import first_name
from stepcell.files import atomic_path, read_bytes

__all__ = ["Snapshot", "contract_hash", "read_snapshot", "write_snapshot"]

METADATA_KEY = "stepcell.snapshot"
SCHEMA = "1.0"

States = Mapping[str, NDArray[Any]]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot says beside its states.

    Attributes:
        schema: version `major.minor`; an unknown major version is refused.
        contract_hash: of the model it belongs to.
        checksum: SHA-256 of the states' bytes, in the order of their names.
        frame: frames that had been stepped, as the one who saved it counted.
        slots: row by name of the streams that were attached; None: a loop without slots.
        rows: rows of the batch of a loop with slots.
        metadata: the user's own.
    """

    schema: str = SCHEMA
    contract_hash: str
    checksum: str = ""
    frame: Annotated[int, msgspec.Meta(ge=0)] = 0
    slots: dict[str, int] | None = None
    rows: int | None = None
    metadata: dict[str, str] = {}


def identity(contract: StepContract) -> dict[str, Any]:
    """What must agree for a state to mean the same: the weights, and what is remembered.

    Not in it: sizes and dtypes, which the arrays are checked for (a float16 model runs on a CPU
    in float32, an engine may be fixed at one size), parity and versions of tools, since a model
    exported again from the same checkpoint remembers the same.
    """
    source = contract.source
    return {
        "family": first_name(contract.family),
        "module": source.get("module"),
        "arguments": source.get("arguments"),
        # Of the checkpoint, or of the ONNX file that was adopted.
        "files": {key: value for key, value in source.items() if key.endswith("sha256")},
        "inputs": [spec.name for spec in contract.inputs],
        "states": [[state.name, len(state.shape), state.batch_axis, _initial(state)] for state in contract.states],
    }


def contract_hash(contract: StepContract) -> str:
    """SHA-256 of the model's identity, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(identity(contract), order="deterministic")).hexdigest()


def write_snapshot(path: Path, states: States, snapshot: Snapshot) -> None:
    """Write a file; a reader sees the old one or the new one, also after a power cut.

    Args:
        snapshot: `checksum` is filled in here.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in states.items()}
    snapshot = msgspec.structs.replace(snapshot, checksum=_checksum(arrays))
    data = save(arrays, {METADATA_KEY: msgspec.json.encode(snapshot).decode()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    try:
        folder = os.open(path.parent, os.O_RDONLY)  # the new name itself is on the disk only after this
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OutputError(f"{path}: its folder cannot be synchronised to the disk ({error.strerror})") from error


def read_snapshot(path: Path, contract: StepContract) -> tuple[dict[str, NDArray[Any]], Snapshot]:
    """States and description of a snapshot of this model.

    Raises:
        InputError: it cannot be read, is cut off or changed, or is no snapshot.
        StateError: it belongs to another model.
    """
    states, snapshot = _parse(path)
    if snapshot.contract_hash != contract_hash(contract):
        raise StateError(
            f"{path}: a snapshot of another model: its contract has the hash {snapshot.contract_hash[:12]}..., "
            f"this one {contract_hash(contract)[:12]}...",
            hint="weights, arguments, states and initial values must be those it was taken with (docs/run.md)",
        )
    return states, snapshot


def _parse(path: Path) -> tuple[dict[str, NDArray[Any]], Snapshot]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(path)
    try:
        states = load(data)
        # It has just been checked: eight bytes with the length of the header, then the header.
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get(METADATA_KEY)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a whole .safetensors file ({error})") from error
    if text is None:
        raise InputError(f"{path}: no snapshot: a .safetensors file without the metadata key {METADATA_KEY}")
    try:
        snapshot = msgspec.json.decode(text, type=Snapshot)
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: malformed snapshot: {error}") from error
    if snapshot.schema.split(".")[0] != SCHEMA.split(".")[0]:
        raise InputError(f"{path}: snapshot schema {snapshot.schema} is not supported; this stepcell reads {SCHEMA}")
    rows = list((snapshot.slots or {}).values())
    if len(set(rows)) < len(rows) or any(not 0 <= row < (snapshot.rows or 0) for row in rows):
        raise InputError(f"{path}: malformed snapshot: slots in rows {rows} of {snapshot.rows}")
    if snapshot.checksum != _checksum(states):
        raise InputError(f"{path}: damaged: its numbers do not have the checksum that was written with them")
    return states, snapshot


def _checksum(states: States) -> str:
    digest = hashlib.sha256()
    for name in sorted(states):
        digest.update(np.ascontiguousarray(states[name]).data)
    return digest.hexdigest()


def _initial(state: StateSpec) -> str:
    if isinstance(state.init, InitialValue):
        with np.errstate(over="ignore"):  # as float16, which a model exported with float16 states has them in
            return hashlib.sha256(state.init.array().astype("<f2").tobytes()).hexdigest()
    return state.init
