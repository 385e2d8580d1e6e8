"""Names of the columns of events, as data sets and tools spell them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["columns_named"]

_SPELLINGS = (
    ("x", "xs", "x_coord"),
    ("y", "ys", "y_coord"),
    ("p", "ps", "pol", "polarity", "on"),
    ("t", "ts", "timestamp", "time"),
)


def columns_named(names: Iterable[str]) -> tuple[str, str, str, str] | None:
    """The names of x, y, p and t among those of a table's columns; None: one is missing or there are two."""
    there = {name.strip().lower(): name for name in names}
    found = [[there[each] for each in spellings if each in there] for spellings in _SPELLINGS]
    if any(len(each) != 1 for each in found):
        return None
    (x,), (y,), (p,), (t,) = found
    return x, y, p, t
