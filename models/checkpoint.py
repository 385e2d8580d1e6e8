"""Write a model's weights as safetensors, with the family and its arguments beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import nn

from stepcell.files import write_atomic

__all__ = ["ARGUMENTS_KEY", "FAMILY_KEY", "save_checkpoint"]

FAMILY_KEY = "stepcell.family"
ARGUMENTS_KEY = "stepcell.arguments"


def save_checkpoint(
    model: nn.Module, path: Path, *, family: str | None = None, arguments: Mapping[str, object] | None = None
) -> None:
    """Write `model`'s state_dict; `stepcell export` then needs no `--family` and no `--set`.

    Args:
        family: name of the family in `stepcell export --list-families`.
        arguments: what the family's constructor was called with, JSON values.
    """
    metadata = {}
    if family is not None:
        metadata = {FAMILY_KEY: family, ARGUMENTS_KEY: json.dumps(dict(arguments or {}))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata=metadata))
