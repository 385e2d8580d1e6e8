"""Clips to verify with: frames by input name, the same for both sides, as often as they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.dims import bind, resolve, symbols_of
from stepcell.errors import InputError
from stepcell.nv12 import nv12_of
from stepcell.pixels import picture_channels
from stepcell.runtime.loop.slots import is_shared
from stepcell.runtime.media.events.bad_events import OnBadEvent
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.preprocess import Preprocessor, event_input, image_input
from stepcell.sample_frames import random_frame

__all__ = ["Clip", "random_clip", "sizes_for", "source_clip"]

SMALL = 64  # height and width of synthetic frames where the model leaves them open
MOST_FRAMES = 256  # of a file that are kept in memory; a longer run repeats them
_SEED_OF_STILL = 1

Frame = dict[str, NDArray[Any]]


class Clip:
    """Frames in order; after the last one the first comes again.

    Args:
        frames: each a dict of data inputs by name, all of the same shapes.
        name: for people and reports.
    """

    def __init__(self, frames: Sequence[Mapping[str, NDArray[Any]]], name: str) -> None:
        if not frames:
            raise InputError(f"{name}: holds no frame")
        self._frames = [dict(frame) for frame in frames]
        self.name = name

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, number: int) -> Frame:
        return self._frames[number % len(self._frames)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the data inputs, by name."""
        return {name: array.shape for name, array in self._frames[0].items()}

    @property
    def frames(self) -> list[Frame]:
        """Each one once."""
        return list(self._frames)

    def rows(self, contract: StepContract, count: int) -> Clip:
        """The clip with a batch of `count`: row k is ahead of row 0 by k frames, so that no two rows are alike."""
        frames = []
        for number in range(len(self._frames)):
            frame = {}
            for spec in contract.inputs:
                if is_shared(spec) or not spec.shape:  # one number for all rows
                    frame[spec.name] = self[number][spec.name]
                    continue
                axis = _batch_axis(contract, spec)
                parts = [np.take(self[number + row][spec.name], [0], axis=axis) for row in range(count)]
                frame[spec.name] = np.concatenate(parts, axis=axis)
            frames.append(frame)
        return Clip(frames, self.name)


def _batch_axis(contract: StepContract, spec: TensorSpec) -> int:
    """Axis of an input that counts streams: the one whose size the states' batch axes have."""
    if isinstance(spec.batch_axis, int):
        return spec.batch_axis
    dims = {state.streams for state in contract.states}
    return next((axis for axis, dim in enumerate(spec.shape) if dim in dims and isinstance(dim, str)), 0)


def sizes_for(contract: StepContract, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, int]:
    """A value for every symbol: from `shapes` where given, else small ones.

    A batch is 1, a size of pictures at most 64 (or the next multiple that the model needs), any other as in the
    contract's `example`, since a model of sound or features need not run with another.
    """
    unknown = sorted(set(shapes or {}) - {spec.name for spec in contract.inputs})
    if unknown:
        raise InputError(f"--shape {unknown[0]}: the model has no such input")
    given = shapes or {}
    found = bind((spec.name, spec.shape, given[spec.name]) for spec in contract.inputs if spec.name in given)
    multiple = max((spec.pad_multiple for spec in contract.inputs), default=1)
    batch = {state.streams for state in contract.states} | {"batch"}
    pictures = [spec for spec in contract.inputs if spec.layout is not None or nv12_of(spec)]
    spatial = set(symbols_of(dim for spec in pictures for dim in spec.shape))
    for symbol in contract.symbols:
        small = contract.example.get(symbol, SMALL)
        if symbol in spatial:
            small = min(small, math.ceil(SMALL / multiple) * multiple)
        found.setdefault(symbol, 1 if symbol in batch else small)
    contract.bind({spec.name: resolve(spec.shape, found) for spec in contract.inputs})
    return found


def random_clip(contract: StepContract, sizes: Mapping[str, int], *, count: int = 32, seed: int = 0) -> Clip:
    """Independent uniform values over the declared range: the hardest input for a recurrence, the same for one seed.

    Mean and std of the contract are applied after the range, as they are to pixels.
    """
    rng = np.random.default_rng(seed)
    frames = [
        {spec.name: random_frame(spec, resolve(spec.shape, sizes), rng) for spec in contract.inputs}
        for _ in range(count)
    ]
    return Clip(frames, f"random, seed {seed}, {count} frames")


def source_clip(
    contract: StepContract,
    text: str,
    *,
    limit: int = MOST_FRAMES,
    size: tuple[int, int] | None = None,
    event_stream: str | None = None,
) -> Clip:
    """Frames of a video, a folder, an array or a file of events, as `stepcell run` would feed them; without bad events.

    Args:
        limit: frames at most.
        size, event_stream: as of `open_source`.

    Raises:
        InputError: it cannot be read, a value is NaN or Inf, or the model takes something else.
        UsageError: a size or a stream is missing, or given for an input that takes none.
    """
    spec = image_input(contract)
    channels, events = picture_channels(spec) or 3, event_input(spec, None)
    bad: OnBadEvent = "stop" if events is None else "drop"
    source = open_source(
        text, channels=channels, nv12=nv12_of(spec), size=size, events=events, on_bad_event=bad,
        event_stream=event_stream,
    )  # fmt: skip
    frames: list[Frame] = []
    preprocess: Preprocessor | None = None
    try:
        for frame in source:
            preprocess = preprocess or Preprocessor(spec, frame)
            frames.append({spec.name: preprocess(frame)})
            _require_finite(frames[-1], f"{text}: frame {len(frames) - 1}")
            if len(frames) == limit:
                break
    finally:
        source.close()
    return Clip(frames, f"{Path(text).name}, {len(frames)} frames")


def _require_finite(frame: Frame, where: str) -> None:
    """Verdicts compare finite numbers: a NaN would stay in the states of both runs and equal itself."""
    for name, array in frame.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = array.size - np.count_nonzero(np.isfinite(array))
            raise InputError(
                f"{where}: {name}: {bad} of {array.size} values are NaN or Inf as {array.dtype}",
                hint="clean the frame, or take another clip",
            )
