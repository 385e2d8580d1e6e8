"""Rounding of a convolution's weights to int8 so that its outputs change least on the values of the calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.exporter.quantize.calibrate import Moments

__all__ = ["LEVELS", "round_weight"]

LEVELS = 127  # symmetric: -127 to 127, so that zero is exact
_DAMPING = 0.01  # of the mean square of the inputs: what is added to each, since they are only a sample

Array = NDArray[Any]


def round_weight(weight: Array, moments: Moments | None, divided: Array | None = None) -> tuple[Array, Array, Array]:
    """Int8 weights, their scales, and what the bias needs to keep the mean of every output channel.

    Weights are rounded one after another, and the error of each is made up for by those that are still to come, as far
    as their inputs go together (GPTQ, Frantar et al. 2022, arXiv 2210.17323). Inputs that vary most come first.

    Args:
        weight: (C_out, C_in / groups, k...), float32.
        moments: of the input patches; None: weights are rounded to the nearest.
        divided: (C_in), by what the channels of the input have been divided since the moments were taken.

    Returns:
        levels, int8 of the shape of the weights; scales, float32 (C_out); correction, float32 (C_out).
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(rows).max(1)
    scales = (np.where(largest > 0, largest, 1) / LEVELS).astype(np.float32)
    steps = rows / scales[:, None]
    if moments is None:
        levels, correction = np.clip(np.rint(steps), -LEVELS, LEVELS), np.zeros(len(rows))
    else:
        groups = len(moments.mean)
        by_group = np.ones((groups, rows.shape[1]))
        if divided is not None:
            by_group /= np.repeat(divided.reshape(groups, -1), int(np.prod(weight.shape[2:])), axis=1)
        mean = moments.mean * by_group
        covariance = moments.square * by_group[:, :, None] * by_group[:, None] - mean[:, :, None] * mean[:, None]
        parts = zip(np.split(steps, groups), covariance, strict=True)
        levels = np.concatenate([_round(part, each) for part, each in parts])
        lost = np.concatenate([a @ b for a, b in zip(np.split(steps - levels, groups), mean, strict=True)])
        correction = lost * scales
    return levels.reshape(weight.shape).astype(np.int8), scales, correction.astype(np.float32)


def _round(steps: Array, covariance: Array) -> Array:
    """Levels of rows that are multiplied by inputs of this covariance."""
    damped = covariance + max(_DAMPING * float(np.trace(covariance)) / len(covariance), 1e-30) * np.eye(len(covariance))
    order = np.argsort(-np.diag(damped), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    rest, levels = steps[:, order], np.empty_like(steps)
    for i in range(rest.shape[1]):
        levels[:, order[i]] = np.clip(np.rint(rest[:, i]), -LEVELS, LEVELS)
        error = (rest[:, i] - levels[:, order[i]]) / factor[i, i]
        rest[:, i:] -= np.outer(error, factor[i, i:])
    return levels
