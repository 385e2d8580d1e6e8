"""The torch module that a file was exported from, built again as its contract says."""

from __future__ import annotations

from pathlib import Path

import msgspec
from torch import nn

from stepcell.contract import StepContract
from stepcell.errors import CheckpointError

__all__ = ["load_module"]


def load_module(contract: StepContract, checkpoint: Path | None) -> nn.Module:
    """The step model that a file was exported from, built again as the contract's `source` says.

    Args:
        checkpoint: the file of the weights; None: a module of a factory that has its own.

    Raises:
        CheckpointError: it is not the checkpoint of this file, or the contract does not say how it was loaded.
    """
    from stepcell.exporter.from_checkpoint.checkpoint import load_checkpoint
    from stepcell.exporter.from_checkpoint.families.registry import FAMILIES
    from stepcell.exporter.from_checkpoint.step_model import load_weights, step_model
    from stepcell.exporter.from_module.factory import module_from_factory
    from stepcell.exporter.from_module.lift import lift_states
    from stepcell.models.step import is_step_module
    from stepcell.renamed_families import current_name

    source, arguments = contract.source, dict(contract.source.get("arguments") or {})
    content = None
    if checkpoint is not None:
        key, prefix = (source.get(f"checkpoint_{name}") for name in ("key", "prefix"))
        content = load_checkpoint(
            checkpoint, key=None if key is None else str(key), prefix=None if prefix is None else str(prefix)
        )
    factory = source.get("module")
    if factory is None:
        if content is None:
            raise CheckpointError("the contract names no module: the checkpoint is needed to compare with it")
        family = FAMILIES.get(current_name(contract.family))
        if family is None:
            raise CheckpointError(
                f"{checkpoint}: the contract's family is {contract.family!r}, which no checkpoint is loaded by",
                hint="compare with the graph itself (no --against), or with another ONNX file",
            )
        shapes = {
            spec.name: [dim if isinstance(dim, int) else contract.example[dim] for dim in spec.shape]
            for spec in contract.inputs
            if all(isinstance(dim, int) or dim in contract.example for dim in spec.shape)
        }
        known = {key: value for key, value in arguments.items() if key in family.settings}
        model, _, _ = step_model(content, family.name, known, shapes)
        return model
    model = module_from_factory(str(factory), arguments)
    if content is not None:
        load_weights(model, content, f"--module {factory}")
    if not is_step_module(model):
        called_with, positions = _called_with(contract)
        model = lift_states(model, called_with, returned=positions)
    return model.float().eval()


def _called_with(contract: StepContract) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """`--shape` and `--state` of the export; sizes that are not recorded are those of the example."""
    example = {
        spec.name: tuple(dim if isinstance(dim, int) else contract.example[dim] for dim in spec.shape)
        for spec in contract.inputs
    }
    try:
        shapes = msgspec.convert(contract.source.get("shapes", example), dict[str, tuple[int, ...]])
        return shapes, msgspec.convert(contract.source.get("states", {}), dict[str, int])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"the contract's `source` does not say how the module was called: {error}") from error
