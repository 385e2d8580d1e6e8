"""Plots as files: .svg, drawn by stepcell itself, or .png where matplotlib is installed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from stepcell.errors import UsageError
from stepcell.files import write_atomic
from stepcell.optional_imports import require
from stepcell.overwrite import MARK
from stepcell.runtime.verify.report.page import growth_plot
from stepcell.runtime.verify.results import Growth

__all__ = ["check_plot", "check_svg", "write_growth"]

_SUFFIXES = (".svg", ".png")


def check_plot(path: Path | None) -> None:
    """Raise UsageError where no plot can be written under this name; to be called before the work."""
    if path is not None and path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--plot: expected a name that ends in {' or '.join(_SUFFIXES)}, got {path}")


def check_svg(path: Path | None) -> None:
    """The same where .svg is the only kind."""
    if path is not None and path.suffix.lower() != ".svg":
        raise UsageError(f"--plot: expected a name that ends in .svg, got {path}")


def write_growth(path: Path, growth: Sequence[Growth]) -> None:
    """Write the plot of an error growth.

    Raises:
        UsageError: another suffix.
        MissingDependencyError: .png, and matplotlib is not installed.
    """
    check_plot(path)
    write_atomic(path, growth_plot(growth) if path.suffix.lower() == ".svg" else _growth_png(growth))


def _growth_png(growth: Sequence[Growth]) -> bytes:
    """Free-running rms errors over the steps; dashed: what the precision costs by itself."""
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
        figure.savefig(file, format="png", dpi=140, metadata={"Comment": MARK})
        return file.getvalue()
