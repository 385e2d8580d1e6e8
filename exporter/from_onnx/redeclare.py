"""What a user says of a file that has a contract already, its pictures and values of inputs: nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import onnx

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.exporter.from_onnx.input_values import Number, checked_values
from stepcell.exporter.from_onnx.onnx_file import Port
from stepcell.external_weights import ONE_FILE, load_external_weights
from stepcell.onnx_model import read_onnx
from stepcell.pixels import Declaration, changes, declare

__all__ = ["declared", "redeclare"]

logger = logging.getLogger(__name__)


def declared(contract: StepContract, pixels: Declaration | None) -> StepContract:
    """The contract with a declaration; what it changes is logged.

    Raises:
        UsageError: the declaration does not fit.
    """
    found = declare(contract, pixels)
    for change in changes(contract, found):
        logger.info(f"pixels:  {change}")
    return found


def redeclare(
    source: Path, target: Path, pixels: Declaration | None, values: Mapping[str, Sequence[Number]]
) -> tuple[StepContract, onnx.ModelProto]:
    """The file at `source` with another declaration in its contract; graph, weights and other metadata are kept.

    Args:
        target: where it will be written.
        values: by input, what a step takes that is not given one, as for `fuse`.

    Raises:
        UsageError: the declaration or a value does not fit the contract.
        InputError: the file cannot be read.
        ContractError: it has changed since its export.
    """
    file = read_onnx(source)
    model, contract = file.model, declared(_with_values(file.contract, values), pixels)
    if source.absolute().parent != target.absolute().parent:  # weights beside the file would not be found there
        load_external_weights(model, source, limit=ONE_FILE)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = contract.to_sealed_json()
    return contract, model


def _with_values(contract: StepContract, values: Mapping[str, Sequence[Number]]) -> StepContract:
    ports = [Port(spec.name, spec.dtype, tuple(spec.shape)) for spec in contract.inputs]
    found = checked_values(ports, values, option="--value")
    for name, numbers in found.items():
        logger.info(f"value:   {name}: {', '.join(map(str, numbers))} where a step is given none")
    inputs = [
        msgspec.structs.replace(spec, value=found[spec.name]) if spec.name in found else spec
        for spec in contract.inputs
    ]
    return msgspec.structs.replace(contract, inputs=tuple(inputs))
