"""Report of benchmarks/loop.py as a Markdown table and an SVG plot. Ratios are taken within rounds."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import numpy as np
from loops import BASELINE, FLOOR, OURS, UNCHECKED
from numpy.typing import NDArray

from stepcell.errors import InputError

__all__ = ["as_block", "svg", "table", "with_block"]

_BEGIN, _END = "<!-- written by benchmarks/loop.py -->", "<!-- end -->"
_BAR, _LABEL, _WIDTH = 14, 210, 860
_COLOURS = {OURS: "#76b900", UNCHECKED: "#76b900", BASELINE: "#4a6fa5"}
_OTHER = "#a8a8a8"


def table(result: dict[str, Any]) -> str:
    """Milliseconds per step and ratio to the baseline, speed-ups, and the conditions of the measurement."""
    shapes = result["shapes"]
    heads = [f"{shape['name']}<br>{'x'.join(map(str, shape['frame']))}" for shape in shapes]
    rule = "|---" * (len(heads) + 1) + "|"
    lines = [_row("per step; ratio to `session.run` (quartiles)", heads), rule]
    for name in shapes[0]["loops"]:
        lines.append(_row(f"**{name}**" if name == OURS else name, [_cell(shape["loops"], name) for shape in shapes]))
    lines += ["", _row("how many times as fast (quartiles)", heads), rule]
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
    return "\n".join([*lines, "", f"{_machine(result)}; {_conditions(result)}."]) + "\n"


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
    """Bar plot of the median ratio to the baseline with quartiles; long bars are cut off."""
    rows = [(shape, name) for shape in result["shapes"] for name in (None, *shape["loops"])]
    ratios = [_ratio(s["loops"], name) for s, name in rows if name and "milliseconds" in s["loops"][name]]
    longest = min(1.05 * max(float(np.percentile(ratio, 75)) for ratio in ratios), 8.0)
    scale = (_WIDTH - _LABEL - 130) / longest
    one = _LABEL + scale
    title = f"Time of one step on a CPU, {BASELINE} = 1 (median and quartiles of the rounds)"
    height = 78 + len(rows) * (_BAR + 5)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="4" y="38" fill="#666">{escape(_machine(result))}</text>',
        f'<text x="4" y="54" fill="#666">{escape(_conditions(result))}</text>',
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="62" y2="{height - 6}" stroke="#4a6fa5" stroke-dasharray="3 3"/>',
    ]
    for i, (shape, name) in enumerate(rows):
        y = 66 + i * (_BAR + 5)
        if name is None:
            lines.append(f'<text x="4" y="{y + 12}" font-weight="bold">{escape(shape["name"])}</text>')
            continue
        lines.append(f'<text x="16" y="{y + 11}">{escape(name)}</text>')
        if "milliseconds" not in shape["loops"][name]:
            lines.append(f'<text x="{_LABEL + 5}" y="{y + 11}" fill="#666">not run</text>')
            continue
        low, middle, high = np.percentile(_ratio(shape["loops"], name), [25, 50, 75])
        start, bar, end = (_LABEL + min(float(value), longest) * scale for value in (low, middle, high))
        colour = _COLOURS.get(name, _OTHER)
        lines += [
            f'<rect x="{_LABEL}" y="{y}" width="{bar - _LABEL:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y + 7}" y2="{y + 7}" stroke="black"/>',
            f'<text x="{end + 5:.1f}" y="{y + 11}">{middle:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


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
    return (
        f"{result['cpu']}, {result['threads']} threads on {result['cores']} cores; ONNX Runtime "
        f"{versions['onnxruntime']}, torch {versions['torch']}, Python {versions['python']}"
    )


def _conditions(result: dict[str, Any]) -> str:
    rounds = [str(shape["rounds"]) for shape in result["shapes"]]
    return (
        f"{', '.join(rounds)} rounds; load average {result['load_before'][0]:.1f} before, "
        f"{result['load_after'][0]:.1f} after"
    )
