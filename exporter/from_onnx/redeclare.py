"""What a user says of the pictures of a file that has a contract already: nothing else in the file changes."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

from stepcell.contract import METADATA_KEY, StepContract
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


def redeclare(source: Path, target: Path, pixels: Declaration) -> tuple[StepContract, onnx.ModelProto]:
    """The file at `source` with another declaration in its contract; graph, weights and other metadata are kept.

    Args:
        target: where it will be written.

    Raises:
        UsageError: the declaration does not fit the contract.
        InputError: the file cannot be read.
        ContractError: it has changed since its export.
    """
    file = read_onnx(source)
    model, contract = file.model, declared(file.contract, pixels)
    if source.absolute().parent != target.absolute().parent:  # weights beside the file would not be found there
        load_external_weights(model, source, limit=ONE_FILE)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = contract.to_sealed_json()
    return contract, model
