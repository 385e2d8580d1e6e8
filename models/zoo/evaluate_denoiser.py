"""PSNR of the denoiser and of classical filters on the held-out clip.

    python -m stepcell.models.zoo.evaluate_denoiser models/zoo/denoiser.safetensors -o models/zoo/denoiser.json

The filter strength of non-local means (OpenCV) is the best one for this clip and noise, chosen with the
clean frames; the network is not tuned on this clip.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from stepcell.files import sha256_file
from stepcell.models.step import StepModule, initial_states
from stepcell.models.zoo.clips import HELD_OUT, add_noise, psnr, read_clip
from stepcell.models.zoo.denoiser import Denoiser

NOISE = (15.0, 25.0, 40.0)  # standard deviations, in 0 to 255
SEED = 2026

Frames = NDArray[np.uint8]


def denoise(model: StepModule, frames: Frames, *, reset_every_frame: bool = False) -> Frames:
    """Run the model over frames (T, H, W, 3) in float32."""
    states: tuple[Tensor, ...] = ()
    denoised = []
    for frame in frames:
        x = torch.from_numpy(frame).permute(2, 0, 1)[None] / 255
        if not states or reset_every_frame:
            states = initial_states(model, x)
        with torch.no_grad():
            y, *new_states = model(x, *states)
        states = tuple(new_states)
        denoised.append((y[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    return np.stack(denoised)


def non_local_means(noisy: Frames, clean: Frames, sigma: float) -> tuple[Frames, float]:
    """Filter frame by frame with the strength that gives the best PSNR on this clip; returns the strength too."""
    candidates: list[tuple[Frames, float]] = []
    for factor in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        strength = factor * sigma
        frames = [cv2.fastNlMeansDenoisingColored(frame, None, strength, strength, 5, 15) for frame in noisy]
        candidates.append((np.stack(frames), strength))
    return max(candidates, key=lambda item: psnr(item[0], clean))


def non_local_means_over_time(noisy: Frames, clean: Frames, sigma: float) -> tuple[Frames, float]:
    """Filter over five frames, two of them future ones, which a live stream does not have."""
    padded = [*noisy[:2][::-1], *noisy, *noisy[-2:][::-1]]
    candidates: list[tuple[Frames, float]] = []
    for factor in (0.4, 0.5, 0.6, 0.7, 0.8):
        strength = factor * sigma
        frames = [
            cv2.fastNlMeansDenoisingColoredMulti(padded, t + 2, 5, None, strength, strength, 5, 15)
            for t in range(len(noisy))
        ]
        candidates.append((np.stack(frames), strength))
    return max(candidates, key=lambda item: psnr(item[0], clean))


def evaluate(model: StepModule, sigmas: Sequence[float]) -> list[dict[str, float]]:
    """PSNR values in dB, one row per noise level."""
    clean, rows = read_clip(HELD_OUT), []
    for sigma in sigmas:
        noisy = add_noise(clean, sigma, SEED)
        still, strength = non_local_means(noisy, clean, sigma)
        moving, strength_over_time = non_local_means_over_time(noisy, clean, sigma)
        rows.append(
            {
                "sigma": sigma,
                "noisy": psnr(noisy, clean),
                "denoiser": psnr(denoise(model, noisy), clean),
                "denoiser_reset_every_frame": psnr(denoise(model, noisy, reset_every_frame=True), clean),
                "non_local_means": psnr(still, clean),
                "non_local_means_5_frames": psnr(moving, clean),
                "non_local_means_strength": strength,
                "non_local_means_5_frames_strength": strength_over_time,
            }
        )
        click.echo("  ".join(f"{key} {value:.2f}" for key, value in rows[-1].items()))
    return rows


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file for the figures.")
def main(checkpoint: Path, output: Path | None) -> None:
    """Evaluate CHECKPOINT on the held-out clip."""
    weights = load_file(checkpoint)
    model = Denoiser(weights["down.weight"].shape[0])
    model.load_state_dict(weights)
    rows = evaluate(model.eval(), NOISE)
    if output is not None:
        result = {
            "clip": HELD_OUT,
            "frames": 120,
            "unit": "dB",
            "seed": SEED,
            "checkpoint_sha256": sha256_file(checkpoint),
            "torch": str(torch.__version__),
            "opencv": cv2.__version__,
            "results": rows,
        }
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
