"""Snapshots: the states of a loop in a file, from which another process can continue.

A snapshot is a .safetensors file with the states by name, and a JSON document (`Snapshot`) in its metadata under the
key `stepcell.snapshot`. It can be loaded on every back end and engine of the same model, but not by another model:
`identity` lists what has to agree. Files are written atomically and sealed with a checksum of the whole file, which is
verified on reading.
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
from stepcell.files import atomic_path, read_bytes
from stepcell.json_text import decode_json
from stepcell.library_errors import library_errors
from stepcell.overwrite import SNAPSHOT_KEY, check_output, is_snapshot
from stepcell.renamed_families import first_name
from stepcell.seal import ZEROS, check_seal, sealed

__all__ = ["Snapshot", "contract_hash", "read_snapshot", "write_snapshot"]

SCHEMA = "2.0"  # 2: the checksum is of the whole file
_FIELD = b'\\"checksum\\":\\"'  # JSON in a JSON string

States = Mapping[str, NDArray[Any]]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a snapshot.

    Attributes:
        schema: version `major.minor`; an unknown major version is refused.
        contract_hash: `contract_hash` of the model.
        frame: number of frames that had been stepped, as given to `StepLoop.save`.
        slots: row of each attached slot, by name; None: a loop without slots.
        rows: batch size of a loop with slots; 1 for a snapshot of one slot, which is in row 0 then.
        metadata: the caller's own metadata.
        checksum: SHA-256 of the file with zeros in place of this field.
    """

    schema: str = SCHEMA
    contract_hash: str
    frame: Annotated[int, msgspec.Meta(ge=0)] = 0
    slots: dict[str, int] | None = None
    rows: int | None = None
    metadata: dict[str, str] = {}
    checksum: str = ZEROS


def identity(contract: StepContract) -> dict[str, Any]:
    """The parts of a contract that must agree for a state to have the same meaning.

    Sizes and dtypes are not among them: the arrays are checked instead (a float16 model runs in float32 on a CPU, and
    an engine may have a fixed size). Nor are parity and tool versions, which do not matter for a model that is exported
    again from the same checkpoint.
    """
    source = contract.source
    return {
        "family": first_name(contract.family),
        "module": source.get("module"),
        "arguments": source.get("arguments"),
        # of the checkpoint, or of the ONNX file that was fused
        "files": {key: value for key, value in source.items() if key.endswith("sha256")},
        "inputs": [spec.name for spec in contract.inputs],
        "states": [[state.name, len(state.shape), state.batch_axis, _initial(state)] for state in contract.states],
    }


def contract_hash(contract: StepContract) -> str:
    """SHA-256 of the identity of a model, in hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(identity(contract), order="deterministic")).hexdigest()


def write_snapshot(path: Path, states: States, snapshot: Snapshot, *, overwrite: bool = False) -> None:
    """Write a snapshot atomically: also after a power failure the file is the old one or the new one.

    Args:
        snapshot: its `checksum` is computed here.
        overwrite: replace an existing file that is no snapshot.

    Raises:
        UsageError: there is a file that is no snapshot.
        OutputError: it cannot be written.
    """
    from safetensors.numpy import save

    check_output(path, is_snapshot, reads={}, option="snapshot", overwrite=overwrite)
    arrays = {name: np.ascontiguousarray(array) for name, array in states.items()}
    blank = msgspec.structs.replace(snapshot, checksum=ZEROS)
    data = sealed(save(arrays, {SNAPSHOT_KEY: msgspec.json.encode(blank).decode()}), _FIELD)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    try:
        folder = os.open(path.parent, os.O_RDONLY)  # makes the rename durable
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OutputError(f"{path}: its folder cannot be synchronised to the disk ({error.strerror})") from error


def read_snapshot(path: Path, contract: StepContract) -> tuple[dict[str, NDArray[Any]], Snapshot]:
    """Read a snapshot of this model: its states and its description.

    Raises:
        InputError: it cannot be read, is truncated or modified, or is not a snapshot.
        StateError: it belongs to another model.
    """
    states, snapshot = _parse(path)
    if snapshot.contract_hash != contract_hash(contract):
        raise StateError(
            f"{path}: is a snapshot of another model: its contract has the hash {snapshot.contract_hash[:12]}..., "
            f"this one {contract_hash(contract)[:12]}...",
            hint="weights, arguments, states and initial values must be those it was taken with (docs/run.md)",
        )
    return states, snapshot


def _parse(path: Path) -> tuple[dict[str, NDArray[Any]], Snapshot]:
    from safetensors.numpy import load

    data = read_bytes(path)
    with library_errors(str(path), InputError, what="is not a complete .safetensors file"):
        states = load(data)
        # `load` has checked the layout: the length of the header in eight bytes, then the header.
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get(SNAPSHOT_KEY)
    if text is None:
        raise InputError(f"{path}: is not a snapshot: its metadata has no key {SNAPSHOT_KEY}")
    snapshot = decode_json(text, Snapshot, str(path), what="malformed snapshot")
    if snapshot.schema.split(".")[0] != SCHEMA.split(".")[0]:
        raise InputError(f"{path}: snapshot schema {snapshot.schema} is not supported; this stepcell reads {SCHEMA}")
    if check_seal(data, _FIELD, snapshot.checksum):
        raise InputError(f"{path}: is damaged: it does not match its checksum")
    rows = list((snapshot.slots or {}).values())
    if len(set(rows)) < len(rows) or any(not 0 <= row < (snapshot.rows or 0) for row in rows):
        raise InputError(f"{path}: malformed snapshot: slots in rows {rows} of {snapshot.rows}")
    return states, snapshot


def _initial(state: StateSpec) -> str:
    if isinstance(state.init, InitialValue):
        with np.errstate(over="ignore"):  # as float16: a model exported with float16 states has no more precision
            return hashlib.sha256(state.init.array().astype("<f2").tobytes()).hexdigest()
    return state.init
