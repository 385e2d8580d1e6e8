"""Report of benchmarks/loop.py as a Markdown table and an SVG plot. Ratios are taken within rounds."""

from __future__ import annotations

import re
from html import escape
from typing import Any, TypeAlias

import numpy as np
from loops import BASELINE, FLOOR, OURS, UNCHECKED
from numpy.typing import NDArray

from stepcell.errors import InputError

__all__ = ["as_block", "svg", "table", "with_block"]

Rows: TypeAlias = list[tuple[int, str | None]]  # number of the shape and name of the loop; None: a heading
_BEGIN, _END = "<!-- written by benchmarks/loop.py -->", "<!-- end -->"
_BAR, _LABEL, _PANEL, _LONGEST = 14, 230, 420, 4.0
_COLOURS = {OURS: "#76b900", UNCHECKED: "#76b900", BASELINE: "#4a6fa5"}
_OTHER = "#a8a8a8"
_PACKAGES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "torch",
    "python": "Python",
}


def table(result: dict[str, Any]) -> str:
    """For each number of threads the milliseconds per step, ratios to the baseline and speed-ups; the conditions."""
    parts = [_of_threads(threads, shapes) for threads, shapes in _by_threads(result).items()]
    return "\n".join([*parts, f"{_machine(result)}; {_conditions(result)}."]) + "\n"


def _of_threads(threads: int, shapes: list[dict[str, Any]]) -> str:
    heads = [f"{shape['name']}<br>{'x'.join(map(str, shape['frame']))}" for shape in shapes]
    rule = "|---" * (len(heads) + 1) + "|"
    lines = [_row(f"{_threads(threads)}: per step; ratio to `{BASELINE}` (quartiles)", heads), rule]
    for name in shapes[0]["loops"]:
        lines.append(_row(f"**{name}**" if name == OURS else name, [_cell(shape["loops"], name) for shape in shapes]))
    lines += ["", _row(f"{_threads(threads)}: how many times as fast (quartiles)", heads), rule]
    eager = [_best_eager(shape["loops"]) for shape in shapes]
    pairs = [
        (OURS, f"`{BASELINE}`", [BASELINE] * len(shapes)),
        (UNCHECKED, f"`{BASELINE}`", [BASELINE] * len(shapes)),
        (OURS, "torch eager in its better layout", eager),
        (OURS, FLOOR, [FLOOR] * len(shapes)),
    ]
    for loop, text, rivals in pairs:
        factors = [_ratio(shape["loops"], rival, loop) for shape, rival in zip(shapes, rivals, strict=True)]
        lines.append(_row(f"{loop} as {text}", [_quartiles(factor) for factor in factors]))
    return "\n".join([*lines, ""])


def _by_threads(result: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for shape in result["shapes"]:
        found.setdefault(shape["threads"], []).append(shape)
    return found


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def as_block(result: dict[str, Any], picture: str) -> str:
    """The part of a document that shows the result: the plot, then the table."""
    return f"![time of one step by each loop, as a ratio to {BASELINE}]({picture})\n\n{table(result)}"


def with_block(document: str, block: str) -> str:
    """The document with `block` between its two markers.

    Raises:
        InputError: the markers are missing.
    """
    pattern = f"{re.escape(_BEGIN)}.*?{re.escape(_END)}"
    new, count = re.subn(pattern, lambda _: f"{_BEGIN}\n{block}{_END}", document, flags=re.DOTALL)
    if count != 1:
        raise InputError(f"the document: expected one `{_BEGIN}` ... `{_END}`, got {count}", hint="add both markers")
    return new


def svg(result: dict[str, Any]) -> str:
    """Bar plot of the median ratios to the baseline with quartiles, a panel for each number of threads.

    Long bars are cut off.
    """
    panels = _by_threads(result)
    loops = [(shape["loops"], name) for shapes in panels.values() for shape in shapes for name in shape["loops"]]
    ratios = [_ratio(each, name) for each, name in loops if "milliseconds" in each[name]]
    longest = min(1.05 * max(float(np.percentile(ratio, 75)) for ratio in ratios), _LONGEST)
    rows = [(number, name) for number, s in enumerate(next(iter(panels.values()))) for name in (None, *s["loops"])]
    width, height = _LABEL + len(panels) * _PANEL, 84 + len(rows) * (_BAR + 5)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="20" font-size="15">Time of one step on a CPU, {BASELINE} = 1 (median and quartiles of the '
        "rounds)</text>",
        f'<text x="4" y="38" fill="#666">{escape(_machine(result))}</text>',
        f'<text x="4" y="54" fill="#666">{escape(_conditions(result))}</text>',
    ]
    for i, (number, name) in enumerate(rows):
        text = next(iter(panels.values()))[number]["name"] if name is None else name
        where = 'x="4" font-weight="bold"' if name is None else 'x="16"'
        lines.append(f'<text {where} y="{_top(i) + 11}">{escape(text)}</text>')
    for column, (threads, shapes) in enumerate(panels.items()):
        left = _LABEL + column * _PANEL
        lines += _panel(left, (_PANEL - 90) / longest, longest, _threads(threads), shapes, rows)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(
    left: int,
    scale: float,
    longest: float,
    title: str,
    shapes: list[dict[str, Any]],
    rows: list[tuple[int, str | None]],
) -> list[str]:
    one = left + scale
    bottom = _top(len(rows))
    lines = [
        f'<text x="{left}" y="70" font-weight="bold">{title}</text>',
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="74" y2="{bottom}" stroke="#4a6fa5" stroke-dasharray="3 3"/>',
    ]
    for i, (number, name) in enumerate(rows):
        y = _top(i)
        if name is None:
            continue
        loops = shapes[number]["loops"]
        if "milliseconds" not in loops[name]:
            lines.append(f'<text x="{left + 5}" y="{y + 11}" fill="#666">not run</text>')
            continue
        low, middle, high = np.percentile(_ratio(loops, name), [25, 50, 75])
        start, bar, end = (left + min(float(value), longest) * scale for value in (low, middle, high))
        colour = _COLOURS.get(name, _OTHER)
        lines += [
            f'<rect x="{left}" y="{y}" width="{bar - left:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y + 7}" y2="{y + 7}" stroke="black"/>',
            f'<text x="{end + 5:.1f}" y="{y + 11}">{middle:.2f}</text>',
        ]
    return lines


def _top(row: int) -> int:
    return 76 + row * (_BAR + 5)


def _times(loops: dict[str, Any], name: str) -> NDArray[np.float64]:
    return np.array(loops[name]["milliseconds"], np.float64)


def _ratio(loops: dict[str, Any], name: str, to: str = BASELINE) -> NDArray[np.float64]:
    """Ratio of the times of two loops, round by round."""
    return _times(loops, name) / _times(loops, to)


def _best_eager(loops: dict[str, Any]) -> str:
    return min(("torch eager", "torch eager, channels last"), key=lambda name: float(np.median(_times(loops, name))))


def _row(head: str, cells: list[str]) -> str:
    return f"| {head} | " + " | ".join(cells) + " |"


def _cell(loops: dict[str, Any], name: str) -> str:
    if "milliseconds" not in loops[name]:
        return f"not run: {loops[name]['not_run']}"
    median = f"{np.median(_times(loops, name)):.3g} ms"
    return f"{median}; 1" if name == BASELINE else f"{median}; {_quartiles(_ratio(loops, name))}"


def _quartiles(values: NDArray[np.float64]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _machine(result: dict[str, Any]) -> str:
    versions = result["versions"]
    return f"{result['cpu']}, {result['cores']} cores; " + ", ".join(
        f"{name} {versions[key]}" for key, name in _PACKAGES.items() if key in versions
    )


def _conditions(result: dict[str, Any]) -> str:
    rounds = [str(shape["rounds"]) for shape in result["shapes"]]
    return (
        f"{', '.join(rounds)} rounds; load average {result['load_before'][0]:.1f} before, "
        f"{result['load_after'][0]:.1f} after"
    )
