"""Parser of the names that exporters give to the input and the output of a state.

A name is split into words and numbers (`prev_h_enc0`: prev, h, enc, 0), and words that mark input or
output are removed (prev). An input and an output with the same remaining words are one state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations, pairwise

__all__ = ["Mark", "Reading", "core_of", "numbered", "read", "says_data", "says_state"]


class Mark(IntEnum):
    """Kind of a removed word, ordered by how strongly it implies a value that is carried through time."""

    LETTER = 1  # one letter, such as the T of hT; counts only if the rest names a state
    SIDE = 2  # in, out: data inputs and outputs have these names too
    TIME = 3  # past, next: only states have these


@dataclass(frozen=True)
class Reading:
    """One parse of a name: the remaining words, and the strongest of the removed marks."""

    words: tuple[str, ...]
    mark: Mark | None


_TIME_IN = {"prev", "previous", "past", "old", "prior", "last", "cached", "init", "initial", "cur", "current"}
_TIME_OUT = {"next", "new", "present", "updated", "update", "after", "final", "last", "cur", "current"}
_SIDE = {"in": {"in", "input", "inp", "i"}, "out": {"out", "output", "o"}}
_LETTER = {"in": {"x", "0"}, "out": {"y", "n", "t", "c"}}
_TIME = {"in": _TIME_IN, "out": _TIME_OUT}

_STATE = {
    *("state", "states", "hidden", "cell", "mem", "memory", "cache", "cached", "past", "prev", "previous"),
    *("lstm", "gru", "rnn", "rec", "recurrent", "h", "c", "ht", "ct", "hs", "cs"),
}
_STATE_IF_NUMBERED = {"r", "s", "m"}  # r1, as in Robust Video Matting
_DATA = {
    *("frame", "frames", "image", "images", "img", "imgs", "rgb", "video", "clip", "src", "audio", "wav", "x", "y"),
    *("mask", "flow", "depth", "logits", "features", "feat", "feature", "feats", "events", "points", "skip", "context"),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def read(name: str, side: str) -> list[Reading]:
    """Every parse of `name` as input or output of a state.

    Args:
        side: "in" or "out".
    """
    found: dict[tuple[str, ...], Mark | None] = {}
    for words in _spellings(name, side):
        marks = {index: mark for index in range(len(words)) if (mark := _mark(words, index, side)) is not None}
        for count in range(len(marks) + 1):
            for taken in combinations(marks, count):
                rest = tuple(word for index, word in enumerate(words) if index not in taken)
                if not any(word.isalpha() for word in rest):
                    continue
                if any(marks[index] is Mark.LETTER for index in taken) and not says_state(" ".join(rest)):
                    continue
                mark = max((marks[index] for index in taken), default=None)
                found[rest] = max(found.get(rest) or mark, mark, key=lambda each: each or 0)
    return [Reading(words, mark) for words, mark in found.items()]


def says_state(name: str, *, clearly: bool = False) -> bool:
    """Whether a name denotes a hidden state; `clearly`: by a word, not by a letter such as r1."""
    if any(not _STATE.isdisjoint(spelling) for spelling in _spellings(name, "in")):
        return True
    words = _words(name)
    numbered = any(a in _STATE_IF_NUMBERED and b.isdigit() for a, b in pairwise(words))
    return numbered and not clearly


def says_data(name: str) -> bool:
    """Whether a name denotes a frame or another value that is new at every step."""
    return not _DATA.isdisjoint(_words(name))


def core_of(name: str, words: Iterable[str]) -> str:
    """The part of `name` that spells `words`, for the name of the state: `prev_h_enc0` gives `h_enc0`."""
    wanted = list(words)
    pattern = r"[^A-Za-z0-9]*".join(map(re.escape, wanted))
    match = re.search(pattern, name, re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9_.]", "_", match.group()) if match else "_".join(wanted)


def numbered(name: str) -> tuple[str, int] | None:
    """Stem and number of `s12`, or None."""
    match = re.fullmatch(r"(.*?)[_.]?(\d+)", name)
    return (match[1], int(match[2])) if match else None


def _words(name: str) -> list[str]:
    return [match.group().lower() for match in _WORD.finditer(name)]


def _spellings(name: str, side: str) -> list[list[str]]:
    """The words of a name, and again with marks split off a word that contains them: `htprev`, `hx`."""
    plain = _words(name)
    cut: list[str] = []
    for word in plain:
        cut += _unglued(word, side)
    return [plain] if cut == plain else [plain, cut]


def _unglued(word: str, side: str) -> list[str]:
    for mark in sorted(_TIME[side] | _SIDE[side] | _LETTER[side], key=len, reverse=True):
        for rest, parts in (
            (word.removesuffix(mark), [word.removesuffix(mark), mark]),
            (word.removeprefix(mark), [mark, word.removeprefix(mark)]),
        ):
            if rest != word and rest in _STATE and word not in _STATE:
                return parts
    return [word]


def _mark(words: list[str], index: int, side: str) -> Mark | None:
    word, last = words[index], index == len(words) - 1
    if word in ("key", "values") and "past" in words[:index]:
        return Mark.TIME  # past_key_values.0.key and present.0.key
    if word in _TIME[side]:
        return Mark.TIME
    if word in _SIDE[side] and (len(word) > 1 or last):
        return Mark.SIDE
    first_letter = index == 0 and word in ("c", "n", "y") and len(words) > 1 and side == "out"
    if word in _LETTER[side] and (last or first_letter) and len(words) > 1:
        return Mark.LETTER
    return None
