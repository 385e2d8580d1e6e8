"""Line plots on logarithmic axes as SVG text, drawn here so that a device needs no plotting library.

Colours are CSS variables with a fallback: the page sets them for light and dark, a file alone is light.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepcell.overwrite import MARK

__all__ = ["Series", "line_plot"]

WIDTH, HEIGHT = 500, 320  # small, so that its text can be read where it is shrunk to a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 96, 34, 44
_COLOURS = ("#2f6fdb", "#d9622b", "#15926d", "#9a4fc0", "#b78a12", "#64748b")
_MOST = len(_COLOURS)
_LABEL = 15  # px between two labels


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: written at its end.
        x, y: points; what is not above zero, or infinite, is left out.
        like: index of the series whose colour it takes, and then it is dashed; None: the next colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    like: int | None = None


def line_plot(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """A plot with both axes logarithmic; of more than six solid lines the first six are drawn."""
    shown = [each for index, each in enumerate(series) if (each.like if each.like is not None else index) < _MOST]
    drawn = [(each, _points(each)) for each in shown]
    drawn = [(each, points) for each, points in drawn if points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="14" fill="var(--ink, #1b2230)">',
        f"<title>{html.escape(title)}</title><!-- {MARK} -->",
        f'<text x="{_LEFT}" y="20" font-weight="600">{html.escape(title)}</text>',
    ]
    if not drawn:
        parts.append(f'<text x="{_LEFT}" y="{HEIGHT / 2}">nothing differs by more than zero</text></svg>')
        return "\n".join(parts) + "\n"
    xs, ys = ([point[axis] for _, points in drawn for point in points] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 2), _ticks(min(ys), max(ys), 10)
    x_low, x_high = min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs), min(xs) * 2)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(x_low)) / (math.log(x_high) - math.log(x_low))
        up = (math.log(y) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule, #dfe3ea)"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>')
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="{WIDTH - 6}" y="20" text-anchor="end">{html.escape(y_label)}</text>')

    labels: list[tuple[float, str, str]] = []
    number = 0
    for each, points in drawn:
        index = each.like if each.like is not None else number
        number += each.like is None
        colour = f"var(--line-{index}, {_COLOURS[index % _MOST]})"
        dots = [place(*point) for point in points]
        path = " ".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(dots))
        dash = ' stroke-dasharray="5 4"' if each.like is not None else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if each.like is None:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
        labels.append((dots[-1][1], each.name, colour))
    for y, name, colour in _apart(labels):
        parts.append(f'<text x="{WIDTH - _RIGHT + 8}" y="{y + 4:.1f}" fill="{colour}">{html.escape(name)}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _points(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.x, series.y, strict=True)
    return [(x, y) for x, y in pairs if x > 0 and y > 0 and math.isfinite(y)]


def _ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of the base around the range, no more than eight; within two decades also 2 and 5 times them."""
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    last = max(last, first + 1)
    if base == 10 and last - first <= 2:
        fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        below = max(tick for tick in fine if tick <= low * (1 + 1e-9))
        above = min(tick for tick in fine if tick >= high * (1 - 1e-9) and tick > below)
        return [tick for tick in fine if below <= tick <= above]
    stride = -(-(last - first) // 7)
    return [float(base) ** power for power in range(first, last + stride, stride)]


def _number(value: float) -> str:
    return f"{value:.0f}" if 1 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _apart(labels: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels moved down until none covers another, and all back up where the last is below the plot."""
    placed: list[tuple[float, str, str]] = []
    for y, name, colour in sorted(labels):
        lowest = placed[-1][0] + _LABEL if placed else -math.inf
        placed.append((max(y, lowest), name, colour))
    over = max(0.0, placed[-1][0] - (HEIGHT - _BOTTOM)) if placed else 0.0
    return [(y - over, name, colour) for y, name, colour in placed]
