"""Shapes in the notation of trtexec: `x:1x3x256x256,flow:1x2x256x256`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepcell.errors import UsageError

__all__ = ["format_shapes", "parse_shapes"]


def parse_shapes(text: str, *, option: str) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name.

    Args:
        option: name of the command line option, for messages.

    Raises:
        UsageError: the text is malformed, or names a tensor twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, _, sizes = part.strip().rpartition(":")
        numbers = sizes.lower().split("x")
        if not name or not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
            raise UsageError(
                f"{option}: expected NAME:AxBxC[,NAME:...], got {text!r}", hint="for example x:1x3x256x256"
            )
        if name in shapes:
            raise UsageError(f"{option}: {name!r} is given twice in {text!r}")
        shapes[name] = tuple(int(number) for number in numbers)
    return shapes


def format_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """The inverse of `parse_shapes`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
