"""`.safetensors` files."""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import Tensor

from stepcell.errors import CheckpointError
from stepcell.exporter.from_checkpoint.printable import first_line

__all__ = ["is_safetensors", "read_safetensors"]


def is_safetensors(path: Path, head: bytes) -> bool:
    """Whether to read a file as safetensors.

    Args:
        head: its first eight bytes.
    """
    return not head.startswith(b"PK") and (
        path.suffix.lower() == ".safetensors" or (head[4:8] == b"\0\0\0\0" and head != b"\0" * 8)
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata. The format declares no more bytes than the file has.

    Raises:
        CheckpointError: damaged, or with a dtype that torch does not have.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # the reader raises several types, torch others
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {first_line(error)}",
            hint="the file is truncated or of another format",
        ) from error
