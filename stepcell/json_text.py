"""JSON in and out: documents from files, which may be damaged, and documents for people, which hold no secrets."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from stepcell.display import displayed
from stepcell.errors import InputError, StepcellError
from stepcell.library_errors import library_errors

__all__ = ["decode_json", "json_text"]

_T = TypeVar("_T")


def decode_json(
    data: bytes | str,
    kind: type[_T],
    subject: str,
    error: type[StepcellError] = InputError,
    *,
    what: str = "malformed JSON",
    hint: str | None = None,
) -> _T:
    """Decode a document of a type that msgspec knows.

    Args:
        subject: the file, for messages.
        what, hint: as of `library_errors`.
        error: class of the error if it cannot be decoded: text that is not UTF-8 or not JSON, that is nested too
            deeply, or a field that is missing or has another type.
    """
    with library_errors(subject, error, what=what, hint=hint):
        return msgspec.json.decode(data, type=kind)


def json_text(document: Any) -> str:
    """Indented JSON of a result, for `--json` and reports; all text in it as `displayed` returns it."""
    return msgspec.json.format(msgspec.json.encode(_displayed(msgspec.to_builtins(document))), indent=1).decode()


def _displayed(value: Any) -> Any:
    if isinstance(value, str):
        return displayed(value)
    if isinstance(value, dict):
        return {_displayed(key): _displayed(each) for key, each in value.items()}
    return [_displayed(each) for each in value] if isinstance(value, (list, tuple)) else value
