"""Checkpoint reader: `.safetensors` and torch files, without executing any code in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter.from_checkpoint.dense_weights import check_finite
from stepcell.exporter.from_checkpoint.expansion import MAX_EXPANSION, check_expansion
from stepcell.exporter.from_checkpoint.safetensors_file import is_safetensors, read_safetensors
from stepcell.exporter.from_checkpoint.torch_file import read_torch_file
from stepcell.exporter.from_checkpoint.weight_sets import TOP, WeightSet, weight_sets
from stepcell.files import read_bytes, sha256_file
from stepcell.models.checkpoint_writer import ARGUMENTS_KEY, FAMILY_KEY

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, with the file's metadata.

    Attributes:
        tensors: the set of weights with the most tensors, on the CPU, names as in the file.
        sha256: hash of the file, in hexadecimal.
        family: as written by `stepcell.models.save_checkpoint`; None in other files.
        arguments: arguments of the family, from the same source; {} in other files.
        key: place of `tensors` in the file, such as `state_dict`; "." for the top level.
        prefix: start of the names of the wanted part; None: found where it is unique.
        others: further sets of weights in the file, such as a running average of the same ones.
        odd: entries of `tensors` that have the name of a parameter and are something else, such as "a.bias (list)".
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    family: str | None
    arguments: dict[str, object]
    key: str = TOP
    prefix: str | None = None
    others: tuple[WeightSet, ...] = ()
    odd: tuple[str, ...] = ()


def load_checkpoint(
    path: str | Path, *, key: str | None = None, prefix: str | None = None, max_expansion: float = MAX_EXPANSION
) -> Checkpoint:
    """Read a `.safetensors` file or a file written by `torch.save` (with `weights_only=True`).

    Args:
        key: entry that holds the weights, such as `params_ema` or `ema.module`; "." is the top level. By default every
            dict of tensors in the file is a candidate.
        prefix: start of the names of the tensors to take, such as `module.update_block.`; by default it is found where
            it is unique.
        max_expansion: a file is refused before it unpacks to more than this many times its size, and more than 256 MiB.

    Raises:
        CheckpointError: truncated, of another format, holding pickled code, holding no tensors, or unpacking to too
            much; holding a single set of weights with NaN or infinity.
        UsageError: `key` or `prefix` names nothing in the file.
        InputError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint file, got a folder")
    metadata: dict[str, str] = {}
    if is_safetensors(path, read_bytes(path, 8)):
        content, metadata = read_safetensors(path)
        sets = weight_sets(content)
    else:
        sets = weight_sets(read_torch_file(path, max_expansion))
    if not sets:
        raise CheckpointError(
            f"{path}: holds no tensors", hint="save a model's state_dict: torch.save(model.state_dict(), path)"
        )
    sets = _under_key(path, sets, key)
    if prefix is not None:
        prefix, sets = _under_prefix(path, sets, prefix)
    check_expansion(path, _size(sets), max_expansion)
    if len(sets) == 1 and prefix is None:
        check_finite(sets[0].tensors, str(path))
    return Checkpoint(
        path=path,
        tensors=sets[0].tensors,
        sha256=sha256_file(path),
        family=metadata.get(FAMILY_KEY),
        arguments=_arguments(path, metadata.get(ARGUMENTS_KEY, "{}")),
        key=sets[0].key,
        prefix=prefix,
        others=tuple(sets[1:]),
        odd=tuple(f"{name} ({kind})" for name, kind in sets[0].no_tensors.items()),
    )


def _under_key(path: Path, sets: list[WeightSet], key: str | None) -> list[WeightSet]:
    if key is None:
        return sets
    found = [weights for weights in sets if weights.key == key or weights.key.startswith(f"{key}.")]
    if not found:
        keys = ", ".join(f"{weights.key} ({len(weights.tensors)} tensors)" for weights in sets[:8])
        raise UsageError(f"--checkpoint-key {key}: {path} has no tensors there", hint=f"it has them under {keys}")
    return [weights for weights in found if weights.key == key] or found


def _under_prefix(path: Path, sets: Sequence[WeightSet], prefix: str) -> tuple[str, list[WeightSet]]:
    """The prefix with a dot at its end, and the sets with names that start with it."""
    prefix = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
    found = [weights for weights in sets if any(name.startswith(prefix) for name in weights.tensors)]
    if not found:
        tops = dict.fromkeys(name.partition(".")[0] + "." for name in sets[0].tensors if "." in name)
        raise UsageError(
            f"--prefix {prefix}: {path} has no tensor whose name starts with it",
            hint=f"its names start with {', '.join(list(tops)[:8])}" if tops else "its names have no prefix",
        )
    return prefix, found


def _size(sets: Sequence[WeightSet]) -> int:
    """Bytes of all tensors, where each is written out: a view of one number may have any shape."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in {id(tensor): tensor for weights in sets for tensor in weights.tensors.values()}.values()
        if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested
    )


def _arguments(path: Path, text: str) -> dict[str, object]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata {ARGUMENTS_KEY} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: metadata {ARGUMENTS_KEY}: expected an object, got {type(arguments).__name__}")
    return arguments
