"""The plot of an error growth as PNG, drawn by matplotlib where that is installed."""

from __future__ import annotations

import io
from collections.abc import Sequence

from stepcell.missing import require
from stepcell.runtime.verify.results import Growth

__all__ = ["growth_png"]


def growth_png(growth: Sequence[Growth]) -> bytes:
    """Free-running rms errors over the steps; dashed: what the precision costs by itself.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="report", purpose="a plot as PNG (an .svg needs nothing)")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for each in growth:
        if max(each.rms, default=0.0) <= 0:
            continue
        (line,) = axes.plot(each.steps, each.rms, marker="o", markersize=4, label=each.name)
        if each.peer_rms:
            axes.plot(each.steps, each.peer_rms, "--", color=line.get_color(), label=f"{each.name}, allowed")
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="rms error of a free run")
    axes.set_xscale("log", base=2)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=140)
        return file.getvalue()
