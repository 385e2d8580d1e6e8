"""Plot of the benchmark's result: per case, the time of every contender relative to the floor and the best peer.

The SVG is written directly: it has a few bars, and the device needs no plotting package.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from kernel_report import strongest

__all__ = ["svg"]

_BAR, _LABEL, _WIDTH = 16, 300, 960
_OURS, _PEER, _BOUND = "#76b900", "#8a8a8a", "#d0d0d0"


def svg(result: dict[str, Any]) -> str:
    """Bars of the isolated median over the floor; a bar longer than the picture is cut and labelled."""
    rows = list(_rows(result))
    longest = min(max((ratio for _, _, ratio, _ in rows if ratio), default=1.0), 20.0)
    scale = (_WIDTH - _LABEL - 240) / longest
    lines = []
    for i, (text, colour, ratio, note) in enumerate(rows):
        y = 34 + i * (_BAR + 5)
        weight = "bold" if ratio is None else "normal"
        lines.append(f'<text x="4" y="{y + 12}" font-weight="{weight}">{escape(text)}</text>')
        if ratio is not None:
            width = min(ratio, longest) * scale
            lines.append(f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>')
            lines.append(f'<text x="{_LABEL + width + 5:.1f}" y="{y + 12}">{escape(note)}</text>')
    title = escape(f"One step (isolated graph replay), times the floor; {result['device']}")
    height = 44 + len(rows) * (_BAR + 5)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"'
    body = "\n".join(lines)
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'{head} font-size="12">\n{background}\n<text x="4" y="20" font-size="15">{title}</text>\n{body}\n</svg>\n'


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str, float | None, str]]:
    """(text, colour, ratio to the floor, note); a row without a ratio is a heading."""
    for case in result["cases"]:
        floor, rival = case["floor_microseconds"]["floor"], strongest(case)
        yield f"{case['name']} (floor {floor:.1f} us)", "", None, ""
        for name, found in case["contenders"].items():
            if "not_run" in found:
                yield name, _PEER, 0.0, "not run"
                continue
            median = found["microseconds"]["isolated"]["median"]
            colour = {"peer": _PEER, "bound": _BOUND}.get(found["role"], _OURS)
            note = f"{median:.1f} us, {median / floor:.1f} x floor"
            yield name, colour, median / floor, note + (f", {median / rival[1]:.2f} x best peer" if rival else "")
