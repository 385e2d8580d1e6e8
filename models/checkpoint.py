"""Weights on disk: safetensors with the family and its arguments beside them, and any family's checkpoint back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import nn

from stepcell.files import write_atomic

__all__ = ["ARGUMENTS_KEY", "FAMILY_KEY", "load", "save_checkpoint"]

FAMILY_KEY = "stepcell.family"
ARGUMENTS_KEY = "stepcell.arguments"
_LOADED_AS = "loaded_as"  # attribute: family and arguments


def load(checkpoint: str | Path, family: str | None = None, **arguments: object) -> nn.Module:
    """Load a checkpoint of any family as a step model that can be trained further.

    `run_sequence` steps it over clips, with gradients; `save_checkpoint` writes it so that
    `stepcell export` knows it again.

    Args:
        checkpoint: in upstream's layout or written by `save_checkpoint`.
        family: name of the family; recognised from the file by default.
        arguments: what the tensors do not determine, as for `stepcell export --set`.

    Returns:
        The canonical step model in float32 and train mode. Norms that export folds into
        convolutions are folded here too.

    Raises:
        CheckpointError: the file cannot be read safely or its tensors do not fit.
        UsageError: an unknown family or argument.
    """
    # The families are the exporter's, which imports this package: found when called, not at import.
    from stepcell.exporter import load_checkpoint, step_model

    model, *loaded_as = step_model(load_checkpoint(Path(checkpoint)), family, arguments)
    setattr(model, _LOADED_AS, tuple(loaded_as))
    return model.train()


def save_checkpoint(
    model: nn.Module, path: Path, *, family: str | None = None, arguments: Mapping[str, object] | None = None
) -> None:
    """Write `model`'s state_dict; `stepcell export` then needs no `--family` and no `--set`.

    Args:
        family: name of the family in `stepcell export --list-families`; that of a model from `load`
            is known.
        arguments: what the family's constructor was called with, JSON values.
    """
    metadata = {}
    if family is None:
        family, arguments = getattr(model, _LOADED_AS, (None, arguments))
    if family is not None:
        metadata = {FAMILY_KEY: family, ARGUMENTS_KEY: json.dumps(dict(arguments or {}))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata=metadata))
