"""Verdicts of trials, remembered on the machine on which they were made."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import msgspec

from stepcell.errors import OutputError
from stepcell.files import write_atomic

__all__ = ["Key", "Verdict", "recall", "remember"]

logger = logging.getLogger(__name__)


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict depends on.

    Attributes:
        network: SHA-256 of the converted model, which has the sizes and the weights of the file.
        symbols: sizes, with the number of streams.
        threads: asked for; None: one per core.
        machine: processor, and its number of cores.
        versions: of stepcell, ncnn and ONNX Runtime.
    """

    network: str
    symbols: dict[str, int]
    threads: int | None
    machine: tuple[str, int]
    versions: tuple[str, str, str]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a trial.

    Attributes:
        difference: largest difference to ONNX Runtime, relative to the largest value of a tensor.
        speedup: how many times as fast as ONNX Runtime; None: not measured, since it differs or nobody asked.
    """

    difference: float
    speedup: float | None = None


class _Record(msgspec.Struct, frozen=True):
    key: Key
    verdict: Verdict


def recall(key: Key) -> Verdict | None:
    """The verdict of an earlier trial; None: there is none that can be read."""
    path = _path(key)
    if path is None:
        return None
    try:
        record = msgspec.json.decode(path.read_bytes(), type=_Record)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return None
    return record.verdict if record.key == key else None


def remember(key: Key, verdict: Verdict) -> None:
    """Keep a verdict. Where the folder cannot be written, the next start makes the trial again."""
    path = _path(key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.format(msgspec.json.encode(_Record(key, verdict)), indent=1) + b"\n")
    except (OSError, OutputError) as error:
        logger.debug(f"{path}: not remembered: {error}")


def _path(key: Key) -> Path | None:
    """A file in $XDG_CACHE_HOME/stepcell/backends, or ~/.cache/stepcell/backends; None: there is no such folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    name = hashlib.sha256(msgspec.json.encode(key)).hexdigest()
    return folder / "stepcell" / "backends" / f"{name[:32]}.json"
