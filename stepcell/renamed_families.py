"""Renamed model families: former names stay valid in `--family`, checkpoint metadata and snapshots."""

from __future__ import annotations

__all__ = ["current_name", "first_name"]

_FIRST_NAMES = {
    "conv2d_lstm_heads": "seed003_convlstm_heads",
    "pooled_gru_heads": "seed000_gru_heads",
}
_CURRENT_NAMES = {first: current for current, first in _FIRST_NAMES.items()}


def current_name(family: str) -> str:
    """Current name of a family that may be given by its first one."""
    return _CURRENT_NAMES.get(family, family)


def first_name(family: str) -> str:
    """Name under which a family was introduced; it never changes, so hashes are made of it."""
    return _FIRST_NAMES.get(family, family)
