"""Checkpoint writer: safetensors with the model's family and its arguments as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import nn

from stepcell.files import write_atomic

__all__ = ["ARGUMENTS_KEY", "FAMILY_KEY", "save_checkpoint", "set_family"]

FAMILY_KEY = "stepcell.family"
ARGUMENTS_KEY = "stepcell.arguments"
_ATTRIBUTE = "_stepcell_family"  # of a module: its family and arguments


def set_family(model: nn.Module, family: str, arguments: Mapping[str, object]) -> None:
    """Mark `model` as one of this family, for `save_checkpoint`."""
    setattr(model, _ATTRIBUTE, (family, arguments))


def save_checkpoint(
    model: nn.Module, path: str | Path, *, family: str | None = None, arguments: Mapping[str, object] | None = None
) -> None:
    """Write the model's state_dict; `stepcell export` reads the file without `--family` and `--set`.

    Args:
        family: name of the family in `stepcell export --list-families`; by default that of a model
            returned by `stepcell.load_model`, otherwise none is written.
        arguments: arguments of the family's constructor, JSON values.

    Raises:
        OutputError: the file cannot be written.
    """
    metadata = {}
    if family is None:
        family, arguments = getattr(model, _ATTRIBUTE, (None, arguments))
    if family is not None:
        metadata = {FAMILY_KEY: family, ARGUMENTS_KEY: json.dumps(dict(arguments or {}))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(Path(path), save(tensors, metadata=metadata))
