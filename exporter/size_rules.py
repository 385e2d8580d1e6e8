"""Rules for sizes: from observed sizes to an expression of symbols.

8, 12 and 6 at heights 32, 48 and 23 is `(height + 2) // 4`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stepcell.dims import Dim, evaluate

__all__ = ["Rule", "rules", "telling_size"]

_STRIDES = (2, 4, 8, 16, 32, 64, 3, 5, 6, 7, 9, 10, 12, 14, 20, 24, 28, 40, 48, 128)
_WHOLES = (5, 8, 10, 3, 4, 16, 20)  # of ratios
_HALVED = (1, 2, 4, 8, 16, 32)
_FACTORS = (2, 4, 8, 16, 32, 3)
_CROPPED = 8  # a convolution without padding removes a few pixels
_TELLING = range(17, 161)  # sizes to try while several rules fit


@dataclass(frozen=True)
class Rule:
    """`(symbol * times + offset) // stride * factor`, or the constant or expression `known` if there is no symbol."""

    symbol: str | None
    offset: int = 0
    stride: int = 1
    factor: int = 1
    known: Dim = 0
    times: int = 1

    def at(self, symbols: Mapping[str, int]) -> int:
        """The size, given a value for every symbol."""
        return evaluate(self.known, symbols) if self.symbol is None else self.of(symbols[self.symbol])

    def of(self, size: int) -> int:
        """The size, given the symbol's value."""
        return (size * self.times + self.offset) // self.stride * self.factor

    @property
    def dim(self) -> Dim:
        """The rule as a dimension of a contract."""
        if self.symbol is None:
            return self.known
        text = self.symbol if self.times == 1 else f"{self.symbol} * {self.times}"
        if self.offset:
            text += f" {'-' if self.offset < 0 else '+'} {abs(self.offset)}"
        if self.offset and (self.stride > 1 or self.factor > 1):
            text = f"({text})"
        text += f" // {self.stride}" if self.stride > 1 else ""
        return f"{text} * {self.factor}" if self.factor > 1 else text


def rules(values: Sequence[int], samples: Sequence[Mapping[str, int]], preferred: Sequence[str]) -> list[Rule]:
    """Every rule that gives these values, the simplest first; a single one if it is certain.

    Args:
        values: the observed size, by sample.
        samples: the value of every symbol, by sample.
        preferred: symbols in the order in which to try them.
    """
    pairs = list(zip(values, samples, strict=True))
    for symbol in preferred:
        if all(sample[symbol] == value for value, sample in pairs):
            return [Rule(symbol)]
    moved = {symbol for symbol in preferred if len({sample[symbol] for sample in samples}) > 1}
    if len(set(values)) == 1:
        # One value at one size is no evidence: the size may be constant or depend on the symbol.
        return [Rule(None, known=values[0])] if moved == set(preferred) else []
    for candidates in (_candidates, _scaled):
        found = [
            rule
            for symbol in preferred
            if symbol in moved
            for rule in candidates(symbol)
            if all(rule.at(sample) == value for value, sample in pairs)
        ]
        if found:
            return found
    return []


def telling_size(found: Sequence[Rule]) -> Iterator[tuple[str, int]]:
    """Symbol and value at which rules of one symbol disagree, the most discriminating first."""
    symbol = found[0].symbol
    rivals = [rule for rule in found if rule.symbol == symbol]
    if symbol is None or len(rivals) < 2:
        return
    answers = {size: [rule.of(size) for rule in rivals] for size in _TELLING}
    commonest = {size: max(map(each.count, set(each))) for size, each in answers.items()}
    for size in sorted(commonest, key=lambda size: (commonest[size], size)):
        if commonest[size] < len(rivals):
            yield symbol, size


def _candidates(symbol: str) -> Iterator[Rule]:
    for stride in _STRIDES:
        yield Rule(symbol, stride=stride)
        yield Rule(symbol, offset=stride - 1, stride=stride)
    for factor in _FACTORS:
        yield Rule(symbol, factor=factor)
        yield from (Rule(symbol, stride=factor, factor=factor), Rule(symbol, factor - 1, factor, factor))
    for stride in (1, *_STRIDES):
        for offset in sorted(range(-_CROPPED, max(stride - 1, _CROPPED + 1)), key=abs):
            if offset:
                yield from (Rule(symbol, offset, stride, factor) for factor in (1, *_FACTORS))


def _scaled(symbol: str) -> Iterator[Rule]:
    """A size scaled by a ratio such as 3/8 and rounded down, then halved some times, rounded up or down."""
    for whole in _WHOLES:
        for times in range(2, whole):
            if math.gcd(times, whole) == 1:
                for halved in _HALVED:
                    offsets = dict.fromkeys((whole * (halved - 1), 0))
                    yield from (Rule(symbol, offset, whole * halved, times=times) for offset in offsets)
