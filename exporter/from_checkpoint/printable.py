"""Text from files for messages: control characters could move a terminal's cursor or change its colours."""

from __future__ import annotations

__all__ = ["first_line", "printable"]

_LONGEST = 200


def printable(text: str) -> str:
    """The text with control characters escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).splitlines()
    return printable(lines[0][:_LONGEST]) if lines else type(error).__name__
