"""`stepcell compare`: two outputs, frame by frame."""

from __future__ import annotations

from pathlib import Path

import click

from stepcell.cli.common import json_option, overwrite_option
from stepcell.cli.console import log, print_json, table
from stepcell.errors import ParityError
from stepcell.overwrite import check_folder, check_output, is_marked

__all__ = ["command"]

_FILE = click.Path(path_type=Path)


@click.command(
    epilog="""\b
Examples:
  stepcell compare engine.npy onnx.npy
  stepcell compare engine.npy onnx.npy --tolerance 0.02 --plot growth.svg
  stepcell compare out.mp4 expected.mp4 --json
"""
)
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@click.option(
    "--tolerance", type=click.FloatRange(0), metavar="T", help="Exit with 3 if an absolute difference is larger."
)
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="F.svg",
    help="Write the error growth as a picture: .svg, or .png where matplotlib is installed.",
)  # fmt: skip
@overwrite_option
@json_option
def command(a: Path, b: Path, tolerance: float | None, plot_path: Path | None, overwrite: bool, as_json: bool) -> None:
    """Compare the outputs A and B, such as of an engine and of the file it was built from.

    Each is a .npy with time first, as `stepcell run --output out.npy` writes it, a video, or a folder of pictures.
    Errors are shown at frames 1, 2, 4, ... as `stepcell verify` shows them.
    """
    from stepcell.cli.plots import check_plot, write_growth
    from stepcell.runtime.verify.compare import compare_outputs

    check_plot(plot_path)
    if plot_path is not None:
        reads: dict[str | Path, str] = {a: "an input", b: "an input"}
        check_output(plot_path, is_marked, reads=reads, option="--plot", overwrite=overwrite)
        check_folder(plot_path, option="--plot")
    found = compare_outputs(a, b, tolerance=tolerance)
    growth = found.growth
    table("difference at frame", ["", *map(str, growth.steps)], [
        ["largest", *(f"{error:.1e}" for error in growth.max_abs)],
        ["rms", *(f"{error:.1e}" for error in growth.rms)],
    ])  # fmt: skip
    if plot_path is not None:
        write_growth(plot_path, [growth])
        log(f"plot:    {plot_path}")
    if found.lengths[0] != found.lengths[1]:
        log(f"note:    {a} has {found.lengths[0]} frames, {b} {found.lengths[1]}; the rest is not compared")
    if found.not_finite:
        log(f"note:    {found.not_finite:,} values are NaN or Inf in both, which is no difference here")
    share = f", {found.differing:.2%} of the values differ" if found.differing is not None else ""
    quality = f", PSNR {found.psnr:.1f} dB" if found.psnr is not None else ""
    log(
        f"compared {found.frames} frames: largest difference {found.worst:.3g} in frame {found.worst_frame} of values "
        f"up to {growth.scale:.3g}, mean rms {found.mean_rms:.3g}, cosine {found.cosine:.6f}{share}{quality}"
    )
    if as_json:
        print_json(found)
    if tolerance is not None and found.beyond is not None:
        raise ParityError(
            f"{a}: differs from {b} by up to {found.worst:.3g}, beyond {tolerance:g} from frame {found.beyond} on"
        )
