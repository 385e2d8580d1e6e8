"""Two outputs, frame by frame: arrays, clips or folders, with the same measures as a verification."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.library_errors import library_errors
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.verify.measure import compared_steps, difference, max_abs, rms, wide
from stepcell.runtime.verify.results import Growth

__all__ = ["Comparison", "compare_outputs"]

_TOGETHER = 64  # steps of an array that are read at once


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How far two outputs are apart.

    Attributes:
        frames: that were compared, and how many either side has.
        growth: error at frames 1, 2, 4, ..., N; the scale is that of the second output.
        worst, worst_frame: largest absolute difference, and the frame (from 1) it is in.
        mean_rms: over all frames.
        cosine: between the two outputs as a whole.
        psnr: in dB, of pixels; None: these are none, or they are equal.
        not_finite: values that are NaN or Inf in both; they are no difference, and in no measure.
        differing: share of the values that differ, of integers and booleans; None: one output is of floats.
        beyond: first frame with a difference above the tolerance; None: there is none.
    """

    frames: int
    lengths: tuple[int, int]
    growth: Growth
    worst: float
    worst_frame: int
    mean_rms: float
    cosine: float
    psnr: float | None
    not_finite: int = 0
    beyond: int | None = None
    differing: float | None = None


def compare_outputs(a: Path, b: Path, *, tolerance: float | None = None) -> Comparison:
    """Compare frame by frame, as many as both have.

    Args:
        a, b: a .npy with time first, a video, or a folder of pictures.
        tolerance: tolerance of absolute differences.

    Raises:
        InputError: one cannot be read, or a frame has another shape than its counterpart.
    """
    rows: list[tuple[float, float]] = []
    scale = dot = norm_a = norm_b = squares = 0.0
    count, unequal, strange, pixels, integers = 0, 0, 0, True, True
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(contextlib.closing(_frames(path))) for path in (a, b)]
        lengths = [0, 0]
        for pair in itertools.zip_longest(*sides):
            for side, frame in enumerate(pair):
                lengths[side] += frame is not None
            left, right = pair
            if left is None or right is None:
                continue
            if left.shape != right.shape:
                raise InputError(
                    f"frame {lengths[0]}: {a} has shape {left.shape}, {b} {right.shape}",
                    hint="compare outputs of the same model and the same frames",
                )
            wrong = difference(left, right)
            rows.append((max_abs(wrong), rms(wrong)))
            x, y = wide(left).ravel(), wide(right).ravel()
            finite = np.isfinite(x) & np.isfinite(y)
            strange += int(np.count_nonzero(~np.isfinite(x) & ~np.isfinite(y)))
            x, y = x[finite], y[finite]
            scale = max(scale, max_abs(y))
            integers &= left.dtype.kind != "f" and right.dtype.kind != "f"
            unequal += int(np.count_nonzero(left != right))
            pixels &= left.dtype == np.uint8 == right.dtype
            dot, norm_a, norm_b = dot + float(x @ y), norm_a + float(x @ x), norm_b + float(y @ y)
            squares += float(np.square(wrong).sum())
            count += wrong.size
    if not rows:
        raise InputError(f"{a}, {b}: no frame to compare ({lengths[0]} and {lengths[1]} frames)")
    steps = compared_steps(len(rows))
    worst = max(range(len(rows)), key=lambda t: rows[t][0])
    mean_square = squares / count if count else 0.0
    return Comparison(
        frames=len(rows),
        lengths=(lengths[0], lengths[1]),
        growth=Growth(
            name=a.name,
            kind="output",
            scale=scale,
            steps=tuple(steps),
            max_abs=tuple(rows[step - 1][0] for step in steps),
            rms=tuple(rows[step - 1][1] for step in steps),
        ),
        worst=rows[worst][0],
        worst_frame=worst + 1,
        mean_rms=float(np.mean([each for _, each in rows])),
        cosine=dot / float(np.sqrt(norm_a * norm_b)) if norm_a and norm_b else float(norm_a == norm_b),
        not_finite=strange,
        differing=unequal / count if integers and count else None,
        psnr=float(10 * np.log10(255.0**2 / mean_square)) if pixels and mean_square else None,
        beyond=None
        if tolerance is None
        else next((t + 1 for t, (error, _) in enumerate(rows) if not error <= tolerance), None),
    )


def _frames(path: Path) -> Generator[NDArray[Any], None, None]:
    if path.suffix.lower() == ".npy":
        with library_errors(str(path), InputError, what="not a readable .npy array"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim < 1:
            raise InputError(f"{path}: expected an array with time first, got a single number")
        for start in range(0, len(array), _TOGETHER):
            yield from np.array(array[start : start + _TOGETHER])
        return
    source = open_source(str(path))
    try:
        yield from source
    finally:
        source.close()
