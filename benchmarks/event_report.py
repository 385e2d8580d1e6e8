"""Report of benchmarks/events.py: a table, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plot", "table"]


def table(result: dict[str, Any]) -> str:
    """Rates, and ratios to the older code."""
    lines = ["| file | reader | million events per CPU second | times the older code |", "|---|---|---|---|"]
    for file, readers in result["reading"].items():
        for name, runs in readers.items():
            rate, ratio = _rate(runs), _ratio(readers, name)
            lines.append(f"| {file} | {name} | {rate} | {ratio} |")
    lines += ["", f"| tensor of {result['window']} events | code | ms | times the older code |", "|---|---|---|---|"]
    for kind, codes in result["tensors"].items():
        for name, runs in codes.items():
            lines.append(
                f"| {kind} | {name} | {min(run['seconds'] for run in runs) * 1e3:.1f} | {_ratio(codes, name)} |"
            )
    lines += ["", "| file | code | peak memory |", "|---|---|---|"]
    for length, codes in result["memory"].items():
        lines += [f"| {length} | {name} | {run['peak MiB']} MiB |" for name, run in codes.items()]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars: events per second of every reader, and milliseconds of every tensor."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "stepcell"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    parts = (("million events per CPU second", "reading", _rate_of), ("ms per tensor, 1280x720", "tensors", _ms_of))
    for axis, (title, part, figure_of) in zip(axes, parts, strict=True):
        names = list(next(iter(result[part].values())))
        for row, name in enumerate(names):
            places = np.arange(len(result[part])) + (row - len(names) / 2) * 0.8 / len(names)
            values = [figure_of(runs[name]) for runs in result[part].values()]
            label = f"commit {result['baseline']}" if name == "baseline" else name
            axis.bar(places, values, 0.8 / len(names), label=label)
        axis.set_xticks(np.arange(len(result[part])), [each.replace(", ", ",\n") for each in result[part]])
        axis.set_title(title)
        axis.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def _good(runs: list[dict[str, Any]]) -> bool:
    return all("seconds" in run for run in runs)


def _rate_of(runs: list[dict[str, Any]]) -> float:
    return float(np.max([run["events"] / run["seconds"] for run in runs])) / 1e6 if _good(runs) else 0.0


def _ms_of(runs: list[dict[str, Any]]) -> float:
    return min(run["seconds"] for run in runs) * 1e3


def _rate(runs: list[dict[str, Any]]) -> str:
    return f"{_rate_of(runs):.1f}" if _good(runs) else f"does not read it: {runs[0].get('error')}"


def _ratio(rows: dict[str, list[dict[str, Any]]], name: str) -> str:
    """Median of the ratios within rounds, and their range."""
    if not _good(rows[name]) or not _good(rows["baseline"]):
        return ""
    ratios = [old["seconds"] / new["seconds"] for old, new in zip(rows["baseline"], rows[name], strict=True)]
    return f"{np.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
