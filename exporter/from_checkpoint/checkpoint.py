"""Checkpoint reader: `.safetensors` and torch files, without executing any code in them."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stepcell.errors import CheckpointError
from stepcell.files import read_bytes, sha256_file
from stepcell.models.checkpoint_writer import ARGUMENTS_KEY, FAMILY_KEY

__all__ = ["Checkpoint", "load_checkpoint"]

# Keys under which training scripts store the weights in a larger checkpoint.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
# Prefixes that wrapper modules add to every key.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, with the file's metadata.

    Attributes:
        tensors: the state_dict, on the CPU, wrapper prefixes removed.
        sha256: hash of the file, in hexadecimal.
        family: as written by `stepcell.models.save_checkpoint`; None in other files.
        arguments: arguments of the family, from the same source; {} in other files.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    family: str | None
    arguments: dict[str, object]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a `.safetensors` file or a file written by `torch.save` (with `weights_only=True`).

    Raises:
        CheckpointError: truncated, of another format, holding pickled code, holding no tensors,
            or holding NaN or infinity.
        InputError: the file cannot be read.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint file, got a folder")
    head = read_bytes(path)[:8]
    if path.suffix == ".safetensors" or (head[4:8] == b"\0\0\0\0" and head != b"\0" * 8):
        tensors, metadata = _load_safetensors(path)
    else:
        tensors, metadata = _load_torch(path), {}
    tensors = _strip_prefixes(tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: tensor {name} holds NaN or infinity",
                hint="the training diverged; use an earlier checkpoint",
            )
    return Checkpoint(
        path=path,
        tensors=tensors,
        sha256=sha256_file(path),
        family=metadata.get(FAMILY_KEY),
        arguments=_arguments(path, metadata.get(ARGUMENTS_KEY, "{}")),
    )


def _arguments(path: Path, text: str) -> dict[str, object]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata {ARGUMENTS_KEY} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: metadata {ARGUMENTS_KEY}: expected an object, got {type(arguments).__name__}")
    return arguments


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {error}",
            hint="the file is truncated or of another format",
        ) from error
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors, metadata


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), None)
        if what is None:
            raise CheckpointError(f"{path}: not a PyTorch checkpoint or a damaged one") from error
        raise CheckpointError(
            f"{path}: holds pickled Python objects, which are never loaded ({what.strip()})",
            hint="in the training code: torch.save(model.state_dict(), path), or safetensors",
        ) from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
        UnicodeDecodeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a PyTorch checkpoint or a damaged one: {reason}") from error
    return _find_tensors(path, content)


def _find_tensors(path: Path, content: object) -> dict[str, Tensor]:
    if tensors := _tensors_in(content):
        return tensors
    got = f"keys {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{path}: expected a dict of tensors, bare or under one of {', '.join(_CONTAINERS)}; got {got}"
    )


def _tensors_in(content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    # Containers first: next to them a training script may store a loss or a counter as a tensor.
    for name in _CONTAINERS:
        if tensors := _tensors_in(content.get(name)):
            return tensors
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while tensors and (prefix := _common_prefix(tensors)):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _common_prefix(names: Iterable[str]) -> str | None:
    shared = (prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names))
    return next(shared, None)
